"""The two checks of a rule: the explicit matrix where the op is linear, quotients where not."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipfast.estimators.certificate import enclose
from lipfast.plan.plan import Plan
from lipfast.plan.state import stack

NORMS = [1, 2, math.inf]


class Function(nn.Module):
    """A module around a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def matrix_of(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix (outputs, inputs) of an affine model, from unit vectors, in float64."""
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        shift = model(torch.zeros(1, *shape, dtype=torch.float64))
        return (model(unit) - shift).reshape(size, -1).T


def largest_quotient(
    model: nn.Module, shape: tuple[int, ...], norm: float, *, scale: float = 1.0, count: int = 400
) -> float:
    """The largest difference quotient of random pairs, near and far, less what rounding adds."""
    generator = torch.Generator().manual_seed(7)
    x = scale * torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    steps = 10.0 ** -torch.randint(0, 6, (count, *[1] * len(shape)), generator=generator).double()
    y = x + scale * steps * torch.randn(count, *shape, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        first, second = model(x).flatten(1), model(y).flatten(1)
    change = (first - second).abs() - 1e-14 * (first.abs() + second.abs() + 1)
    numerator = torch.linalg.vector_norm(change.clamp_min(0), norm, 1)
    return float((numerator / torch.linalg.vector_norm((x - y).flatten(1), norm, 1)).max())


def check_linear(
    model: nn.Module, shape: tuple[int, ...], norm: float, *, slack: float = 1.0
) -> None:
    """The bound is not below the norm of the matrix, and above it at most by a factor `slack`."""
    model = model.double().eval()
    plan = Plan.trace(model, torch.zeros(2, *shape, dtype=torch.float64))
    truth = float(torch.linalg.matrix_norm(matrix_of(model, shape), norm))
    bound = plan.upper(model.state_dict(), norm=norm)
    assert bound.certified
    assert truth * (1 - 1e-14) <= bound.value <= truth * slack * (1 + 2e-6) + 1e-300


def check_quotients(
    model: nn.Module, shape: tuple[int, ...], norm: float, *, scale: float = 1.0
) -> float:
    """No sampled quotient exceeds the bound. Returns how far below they stay."""
    model = model.double().eval()
    plan = Plan.trace(model, torch.zeros(2, *shape, dtype=torch.float64))
    bound = plan.upper(model.state_dict(), norm=norm).value
    largest = largest_quotient(model, shape, norm, scale=scale)
    assert largest <= bound
    return largest / bound


def check_enclosure(model: nn.Module, shape: tuple[int, ...], digits: float = 1e-9) -> None:
    """Running errors cover what differs between two orders of evaluation, and are small.

    The truth is torch's evaluation of the module itself in float64: two results that both err by
    at most e differ by at most 2 e.
    """
    model = model.double().eval()
    x = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plan = Plan.trace(model, x)
    parameters = stack([plan.resolve(model.state_dict())], plan.used_parameters, torch.float64)
    outputs, errors = enclose(plan, parameters, x[None])
    with torch.no_grad():
        truth = model(x).flatten(1)
    assert bool(((outputs[0] - truth).abs() <= 2 * errors[0] + 1e-300).all())
    assert float(errors.max()) <= digits * (1.0 + float(truth.abs().max()))
