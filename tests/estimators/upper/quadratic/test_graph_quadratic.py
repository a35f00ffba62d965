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
    for seed in range(3):
        model = _Graph(shape, seed)
        found, product = _bound(model, _row(), evaluations=evaluations)
        assert found.reason is None
        assert found.value >= _largest_corner(model)
        assert found.value <= product * (1.0 + 1e-6)
        assert math.log(found.value) <= found.log_value <= math.log(found.value) + 1e-12


class _Residual(nn.Module):
    """``x + V relu(U x)``, with the coordinates of the stream scaled."""

    def __init__(self, blocks: int, size: int, decades: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values / shape[1] ** 0.5

        first, last = random(size, size), random(4, size)
        pairs = [(random(size, size), random(size, size)) for _ in range(blocks)]
        scales = 10.0 ** torch.linspace(-decades, decades, size, dtype=torch.float64)
        self.first = nn.Parameter(scales[:, None] * first)
        self.last = nn.Parameter(last / scales)
        self.read = nn.ParameterList([u / scales for u, _ in pairs])
        self.write = nn.ParameterList([scales[:, None] * v for _, v in pairs])

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.first.T
        for u, v in zip(self.read, self.write, strict=True):
            x = x + torch.relu(x @ u.T) @ v.T
        return x @ self.last.T


def test_scaling_the_stream_changes_little_and_deep_sums_gain_much() -> None:
    plain, product = _bound(_Residual(6, 16, 0.0), _row(16), evaluations=20)
    scaled, _ = _bound(_Residual(6, 16, 4.0), _row(16), evaluations=20)
    assert product > 5.0 * plain.value
    assert scaled.value == pytest.approx(plain.value, rel=1e-2)


def _tied_normalisation() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4)).double()
    normalisation = model[2]
    normalisation.bias = normalisation.weight
    normalisation.weight.data.fill_(2.0)
    return model


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x))) + x


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: torch.softmax(h, 1),
    "max pool": lambda h: functional.max_pool1d(h.reshape(-1, 1, 6), 3, 1, 1).flatten(1),
    "layer norm": lambda h: functional.layer_norm(torch.relu(h), (6,), eps=0.1),
    "sorted pairs": lambda h: torch.sort(h.reshape(-1, 3, 2), 2)[0].flatten(1),
    "extrema": lambda h: torch.cat(
        [torch.maximum(h[:, :3], h[:, 3:]), torch.minimum(h[:, :3], h[:, 3:])], 1
    ),
    "two gates": lambda h: torch.sigmoid(h) * torch.tanh(h.flip(1)),
    "gate": lambda h: h * torch.sigmoid(h),
    "clamped": lambda h: torch.maximum(h, torch.zeros(6, dtype=torch.float64)),
    "pool": lambda h: functional.avg_pool1d(torch.relu(h).reshape(-1, 1, 6), 3, 1, 1).flatten(1),
    "padded": lambda h: functional.pad(torch.relu(h), (1, 1), value=7.0)[:, 2:] + h[:, :1],
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_no_jacobian_is_above(name: str) -> None:
    torch.manual_seed(1)
    model = _Of(_FUNCTIONS[name])
    found, product = _bound(model, _row(6), evaluations=20)
    points = torch.randn(20, 6, dtype=torch.float64)
    jacobians = [torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x) for x in points]
    largest = float(torch.linalg.matrix_norm(torch.stack(jacobians), 2).max())
    assert largest * (1.0 - 1e-12) <= found.value <= product * (1.0 + 1e-6)


def test_pairs_that_are_sorted_by_extrema_share_their_relu() -> None:
    torch.manual_seed(1)
    model = _Of(_FUNCTIONS["extrema"])
    found, _ = _bound(model, _row(6), evaluations=40)
    signs = torch.randn(200, 6, dtype=torch.float64)
    jacobians = [torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x) for x in signs]
    assert found.value <= 1.01 * float(torch.linalg.matrix_norm(torch.stack(jacobians), 2).max())


def test_a_tensor_may_be_a_weight_and_a_bias() -> None:
    torch.manual_seed(0)
    model = _tied_normalisation()
    found, _ = _bound(model, _row(4))
    jacobian = torch.autograd.functional.jacobian(model, torch.ones(1, 4).double())
    assert found.value >= float(torch.linalg.matrix_norm(jacobian[0, :, 0], 2)) > 0.1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda h: functional.threshold(h, 1.0, 0.0), "jumps"),
        (functional.hardshrink, "no finite Lipschitz constant"),
        (lambda h: h * h.flip(1), "product of activations"),
    ],
)
def test_what_has_no_constant_has_a_reason(
    function: Callable[[Tensor], Tensor], reason: str
) -> None:
    found, _ = _bound(_Of(function), _row(6))
    assert found.value == found.log_value == math.inf
    assert reason in str(found.reason)


def test_what_is_too_large_says_how_much_it_takes() -> None:
    found, _ = _bound(_Of(torch.relu), _row(6), memory=1000)
    assert found.value == math.inf
    assert "MiB" in str(found.reason)


def test_networks_without_activations_and_constant_ones() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 3).double()
    found, _ = _bound(linear, _row(6))
    norm = float(torch.linalg.matrix_norm(linear.weight.detach(), 2))
    assert norm <= found.value <= norm * (1.0 + 1e-9)


def test_a_start_of_a_similar_network_is_at_least_as_good_as_none() -> None:
    plan = lipfast.compile(_Residual(4, 8, 0.0), _row(8))
    (parameters,) = resolve_all(plan, _Residual(4, 8, 0.0).state_dict())
    long = graph_quadratic(plan, parameters, evaluations=40)
    again = graph_quadratic(plan, parameters, evaluations=0, start=long.logs)
    assert again.value == pytest.approx(long.value, rel=1e-9)
    wrong = {name: torch.full_like(own, math.nan) for name, own in long.logs.items()}
    other = graph_quadratic(plan, parameters, evaluations=0, start=wrong)
    assert other.value == graph_quadratic(plan, parameters, evaluations=0).value
