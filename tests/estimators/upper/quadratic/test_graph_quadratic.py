"""Bounds of small graphs against all corners of their slopes, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.plan.checked import resolve_all
from lipfast.rules.pointwise import GELU, SILU

_SIZE = 3
_Act = Callable[[Tensor], Tensor]
_ACTIVATIONS: dict[str, tuple[_Act, float, float]] = {
    "relu": (torch.relu, 0.0, 1.0),
    "gelu": (functional.gelu, 1.0 - GELU, GELU),
    "silu": (functional.silu, 1.0 - SILU, SILU),
    "leaky": (lambda x: functional.leaky_relu(x, 0.1), 0.1, 1.0),
    "abs": (torch.abs, -1.0, 1.0),
}


class _Graph(nn.Module):
    """A small graph; with `slopes`, the linear map that these make of it."""

    def __init__(self, shape: str, seed: int, decades: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scales = torch.rand(8, generator=generator, dtype=torch.float64)
        scales = 10 ** (decades * (2 * scales - 1))
        size = 8, _SIZE, _SIZE
        weights = torch.randn(size, generator=generator, dtype=torch.float64)
        self.weights = nn.ParameterList(list(weights * scales[:, None, None]))
        chosen = torch.randint(len(_ACTIVATIONS), (2,), generator=generator).tolist()
        self.kinds = [list(_ACTIVATIONS)[index] for index in chosen]
        self.shape = shape
        self.slopes: list[Tensor] | None = None

    def phi(self, index: int, x: Tensor) -> Tensor:
        return (
            _ACTIVATIONS[self.kinds[index]][0](x) if self.slopes is None else x * self.slopes[index]
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        def w(index: int, y: Tensor) -> Tensor:
            return y @ self.weights[index].T

        if self.shape == "residual":
            h = w(0, x)
            h = h + w(2, self.phi(0, w(1, h)))
            return w(5, h + w(4, self.phi(1, w(3, h))))
        if self.shape == "two readers":
            h = self.phi(0, w(0, x))
            return w(1, self.phi(1, w(2, h))) + w(3, h)
        if self.shape == "joined":
            h = torch.cat([self.phi(0, w(0, x)), w(1, x)], 1)
            return self.phi(1, w(2, h[:, :_SIZE]) - w(3, h[:, _SIZE:]))
        if self.shape == "outputs":
            h = self.phi(0, w(0, x))
            return w(1, h), self.phi(1, w(2, h) + x), 2 * w(1, h)
        if self.shape == "branches":
            return w(2, self.phi(0, w(0, x))) + w(3, self.phi(1, w(1, x))) - x
        a = self.phi(0, w(0, x))
        b = self.phi(1, w(1, a) + x)
        return w(2, torch.cat([a, b], 1)[:, 1:4]) + w(3, b)


_SHAPES = ("residual", "two readers", "joined", "outputs", "branches", "sliced")


@torch.no_grad()
def _largest_corner(model: _Graph) -> float:
    """The largest norm of a Jacobian that slopes at the ends of their ranges make."""
    points = torch.cat([torch.zeros(1, _SIZE), torch.eye(_SIZE)]).double()
    best = 0.0
    for corner in itertools.product((1, 2), repeat=2 * _SIZE):
        ends = [_ACTIVATIONS[model.kinds[i // _SIZE]][end] for i, end in enumerate(corner)]
        model.slopes = list(torch.tensor(ends, dtype=torch.float64).reshape(2, _SIZE))
        found = model(points)
        columns = torch.cat(found, 1) if isinstance(found, tuple) else found
        norm = torch.linalg.matrix_norm(columns[1:] - columns[:1], 2)
        best = max(best, float(norm))
    model.slopes = None
    # The norm and the Jacobian are rounded.
    return best * (1.0 - 1e-13)


def _bound(model: nn.Module, example: Tensor, **options: object) -> tuple[object, float]:
    plan = lipfast.compile(model.eval(), example)
    state_dict = model.state_dict()
    (parameters,) = resolve_all(plan, state_dict)
    found = graph_quadratic(plan, parameters, **options)  # type: ignore[arg-type]
    return found, plan.upper(state_dict).value


def _row(size: int = _SIZE) -> Tensor:
    return torch.zeros(1, size, dtype=torch.float64)


@pytest.mark.parametrize("evaluations", [0, 12])
@pytest.mark.parametrize("shape", _SHAPES)
def test_never_below_a_corner_nor_above_the_product(shape: str, evaluations: int) -> None:
    for seed in range(4):
        model = _Graph(shape, seed)
        found, product = _bound(model, _row(), evaluations=evaluations)
        assert found.reason is None
        assert found.value >= _largest_corner(model)
        assert found.value <= product * (1.0 + 1e-6)
        assert math.log(found.value) <= found.log_value <= math.log(found.value) + 1e-12
