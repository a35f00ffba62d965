"""The checks of a rule: explicit matrices where the op is linear, quotients, rounding errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lipfast.estimators.enclosure import enclose
from lipfast.estimators.lower.error_norms import layer_norms, output_error_norms
from lipfast.estimators.plan import Plan
from lipfast.plan.state import stack

NORMS = [1, 2, math.inf]


class Function(nn.Module):
    """A module around a function of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def traced(model: nn.Module, shape: tuple[int, ...]) -> Plan:
    """The plan of a model in float64."""
    return Plan.trace(model.double().eval(), torch.zeros(2, *shape, dtype=torch.float64))


def matrix_of(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix (outputs, inputs) of an affine model, from unit vectors, in float64."""
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        shift = model(torch.zeros(1, *shape, dtype=torch.float64))
        return (model(unit) - shift).reshape(size, -1).T


def check_linear(
    model: nn.Module,
    shape: tuple[int, ...],
    *,
    slack: Sequence[float] = (1.0, 1.0, 1.0),
    digits: float = 1e-12,
) -> None:
    """Bounds are not below the norms 1, 2, inf of the matrix, and above by at most `slack`.

    Rounding errors are enclosed, see `check_enclosure`.
    """
    plan = traced(model, shape)
    matrix = matrix_of(model, shape)
    for norm, factor in zip(NORMS, slack, strict=True):
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        bound = plan.upper(model.state_dict(), norm=norm)
        assert bound.certified
        assert truth * (1 - 1e-14) <= bound.value <= truth * factor * (1 + 2e-6) + 1e-300
    check_enclosure(plan, model, shape, digits)


def check_quotients(
    plan: Plan, model: nn.Module, shape: tuple[int, ...], scales: Sequence[float] = (0.1, 1.0, 3.0)
) -> None:
    """No difference quotient of random pairs, near and far, exceeds a bound."""
    bounds = {norm: plan.upper(model.state_dict(), norm=norm).value for norm in NORMS}
    for scale in scales:
        for x, y, change in _changes(model, shape, scale):
            for norm, bound in bounds.items():
                numerator = torch.linalg.vector_norm(change, norm, 1)
                quotient = numerator / torch.linalg.vector_norm((x - y).flatten(1), norm, 1)
                assert float(quotient.max()) <= bound


def _changes(
    model: nn.Module, shape: tuple[int, ...], scale: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of points and how much the model differs there, less what rounding may add."""
    generator = torch.Generator().manual_seed(7)

    def random() -> Tensor:
        return scale * torch.randn(300, *shape, dtype=torch.float64, generator=generator)

    x, found = random(), []
    for step in (1e-5, 1e-3, 0.1, 1.0):
        y = x + step * random()
        with torch.no_grad():
            first, second = model(x).flatten(1), model(y).flatten(1)
        rounding = 1e-14 * (first.abs() + second.abs() + 1)
        found.append((x, y, ((first - second).abs() - rounding).clamp_min(0)))
    return found


def check_enclosure(plan: Plan, model: nn.Module, shape: tuple[int, ...], digits: float) -> None:
    """Running errors cover what differs between two ways of evaluation, and are small.

    Compared with torch's evaluation of the module in float64: two results that both err by at most
    e differ by at most 2 e.
    """
    x = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parameters = stack([plan.resolve(model.state_dict())], plan.used_parameters, torch.float64)
    outputs, errors = enclose(plan, parameters, x[None])
    with torch.no_grad():
        truth = model(x).flatten(1)
    assert bool(((outputs[0] - truth).abs() <= 2 * errors[0] + 1e-300).all())
    assert float(errors.max()) <= digits * (1.0 + float(truth.abs().max()))
    check_error_norms(plan, model, x, truth)


def check_error_norms(plan: Plan, model: nn.Module, x: Tensor, truth: Tensor) -> None:
    """The same for errors that are carried as norms."""
    tensors = plan.resolve(model.state_dict())
    outputs, errors = output_error_norms(plan, tensors, layer_norms(plan, tensors), x[None])
    assert bool(((outputs[0] - truth).norm(dim=1) <= 2 * errors[0] + 1e-300).all())
