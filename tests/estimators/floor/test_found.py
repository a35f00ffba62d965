"""Floors against all corners of slopes, in exact arithmetic, and below every upper bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.floor.found import floors
from lipfast.estimators.floor.result import Floor
from lipfast.plan.checked import resolve_all
from lipfast.rules.pointwise import GELU

_SIZE = 3
_ENDS = {"relu": (0.0, 1.0), "gelu": (1.0 - GELU, GELU), "leaky": (0.1, 1.0), "abs": (-1.0, 1.0)}
_NORMS = (1, 2, math.inf)
_SHAPES = ("chain", "residual", "two readers", "joined", "maximum")


class _Graph(nn.Module):
    """A small graph; with `slopes`, the linear map that these make of it."""

    def __init__(self, shape: str, seed: int, kind: str = "relu", decades: float = 0.5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        scales = 10 ** (decades * (2 * torch.rand(4, generator=generator).double() - 1))
        weights = torch.randn(4, _SIZE, _SIZE, generator=generator, dtype=torch.float64)
        self.weights = nn.ParameterList(list(weights * scales[:, None, None]))
        self.bias = nn.Parameter(torch.randn(_SIZE, generator=generator, dtype=torch.float64))
        self.shape, self.kind = shape, kind
        self.slopes: list[Tensor] | None = None

    def phi(self, index: int, x: Tensor) -> Tensor:
        if self.slopes is not None:
            return x * self.slopes[index]
        if self.kind == "leaky":
            return functional.leaky_relu(x, 0.1)
        return {"relu": torch.relu, "gelu": functional.gelu, "abs": torch.abs}[self.kind](x)

    def forward(self, x: Tensor) -> Tensor:
        def w(index: int, y: Tensor) -> Tensor:
            bias = self.bias if self.slopes is None and index == 0 else None
            return functional.linear(y, self.weights[index], bias)

        if self.shape == "residual":
            h = w(0, x)
            return w(3, self.phi(1, h + w(2, self.phi(0, w(1, h)))))
        if self.shape == "two readers":
            h = self.phi(0, w(0, x))
            return w(1, self.phi(1, w(2, h))) + w(3, h)
        if self.shape == "joined":
            h = torch.cat([self.phi(0, w(0, x)), w(1, x)], 1)
            return self.phi(1, w(2, h[:, :_SIZE]) - w(3, h[:, _SIZE:]))
        if self.shape == "maximum":
            h, other = w(0, x), w(1, x)
            if self.slopes is None:
                return w(3, self.phi(1, w(2, torch.maximum(h, other))))
            return w(3, self.phi(1, w(2, other + self.phi(0, h - other))))
        return w(2, self.phi(1, w(1, self.phi(0, w(0, x)))))


@torch.no_grad()
def _largest_corners(model: _Graph) -> dict[float, float]:
    """The largest norms of Jacobians that slopes at the ends of their ranges make."""
    jacobians, eye = [], torch.eye(_SIZE, dtype=torch.float64)
    for corner in itertools.product((0, 1), repeat=2 * _SIZE):
        ends = [_ENDS[model.kind][end] for end in corner]
        if model.shape == "maximum":
            ends[:_SIZE] = map(float, corner[:_SIZE])
        model.slopes = list(torch.tensor(ends, dtype=torch.float64).reshape(2, _SIZE))
        jacobians.append(model(eye).T)
    model.slopes = None
    found = torch.stack(jacobians)
    return {norm: float(torch.linalg.matrix_norm(found, norm).max()) for norm in _NORMS}


def _floors(model: nn.Module, norms: Sequence[float]) -> list[Floor]:
    size = next(model.parameters()).shape[-1]
    plan = lipfast.compile(model.eval(), torch.zeros(2, size, dtype=torch.float64))
    own = list(resolve_all(plan, model.state_dict()))
    return [floors(plan, own, norm=norm, effort=1, seed=0)[0] for norm in norms]  # type: ignore[arg-type]


def _floor(model: nn.Module) -> Floor:
    return _floors(model, [2])[0]


@pytest.mark.parametrize("shape", _SHAPES)
def test_the_largest_corner_and_never_above_it(shape: str) -> None:
    reached = []
    for seed, kind in enumerate(_ENDS):
        model = _Graph(shape, seed, kind)
        corners = _largest_corners(model)
        for norm, floor in zip(_NORMS, _floors(model, _NORMS), strict=True):
            # The norm and the Jacobian are rounded.
            assert floor.value <= corners[norm] * (1 + 1e-13)
            assert floor.value > 0.8 * corners[norm]
            assert floor.certified
            reached.append(floor.value >= corners[norm] * (1 - 1e-9))
    assert sum(reached) >= 0.8 * len(reached)


@pytest.mark.parametrize("shape", _SHAPES)
def test_never_above_quadratic_constraints(shape: str) -> None:
    for seed, decades in enumerate((0.0, 6.0)):
        model = _Graph(shape, seed + 10, "gelu", decades)
        plan = lipfast.compile(model, torch.zeros(2, _SIZE, dtype=torch.float64))
        upper = plan.upper(model.state_dict(), method="quadratic")
        assert 0 < _floor(model).value <= upper.value


def _chain(seed: int, *sizes: int) -> nn.Sequential:
    """Linear layers of float64 with ReLUs between."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        scale = 10.0 ** torch.randint(-3, 4, (), generator=generator)
        weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
        layer.weight.data.copy_(scale * weight)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _square_of_image(model: nn.Sequential, floor: Floor) -> tuple[Fraction, Fraction]:
    """``||J v||^2`` and ``||v||^2`` of a pattern, exactly."""
    v = vector = [Fraction(entry) for entry in floor.direction.tolist()]  # type: ignore[union-attr]
    slopes = [own.tolist() for own in floor.slopes.values()]
    for index, layer in enumerate(model[::2]):
        rows = layer.weight.detach().tolist()
        vector = [sum(Fraction(w) * x for w, x in zip(row, vector, strict=True)) for row in rows]
        if index < len(slopes):
            vector = [Fraction(s) * x for s, x in zip(slopes[index], vector, strict=True)]
    return sum(x * x for x in vector), sum(x * x for x in v)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 5, 4, 2)])
def test_at_most_the_norm_of_its_pattern_in_exact_arithmetic(sizes: tuple[int, ...]) -> None:
    models = [_chain(seed, *sizes) for seed in range(30)]
    plan = lipfast.compile(models[0], torch.zeros(2, sizes[0], dtype=torch.float64))
    networks = list(resolve_all(plan, [model.state_dict() for model in models]))
    rounded_up = 0
    for model, floor in zip(models, floors(plan, networks, norm=2, effort=1, seed=0), strict=True):
        image, length = _square_of_image(model, floor)
        assert Fraction(floor.value) ** 2 * length <= image
        assert floor.value >= math.sqrt(image / length) * (1 - 1e-13)
        rounded_up += Fraction(math.sqrt(image / length)) ** 2 * length > image
    # Without any rounding down about every second value would be above.
    assert rounded_up > 5


def test_what_rounding_may_have_added_is_taken_off() -> None:
    """Sums that cancel: of the computed image little is sure."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.LeakyReLU(1.0), nn.Linear(4, 1)).double()
    plan = lipfast.compile(model, torch.zeros(2, 1, dtype=torch.float64))
    weights = []
    for _ in range(30):
        first, last = torch.rand(2, 4, generator=generator, dtype=torch.float64) + 0.5
        last[3] = -float(first[:3] @ last[:3]) / float(first[3])
        own = {"0.weight": first[:, None], "2.weight": last[None]}
        weights.append({**model.state_dict(), **own})
    found = floors(plan, list(resolve_all(plan, weights)), norm=2, effort=1, seed=0)
    for own, floor in zip(weights, found, strict=True):
        model.load_state_dict(own)
        image, length = _square_of_image(model, floor)
        assert Fraction(floor.value) ** 2 * length <= image < Fraction(2) ** -90


def test_deep_chains_have_errors_in_norm() -> None:
    model = _chain(3, *[24] * 24)
    floor = _floor(model)
    upper = lipfast.upper_bound(
        model, torch.zeros(1, 24, dtype=torch.float64), method="quadratic", effort=1
    )
    assert 1e-3 * upper.value < floor.value <= upper.value


class _Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h * torch.sigmoid(1.5 * h))


class _Max(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.maximum(self.first(x), self.other(x)))


def _mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 16), activation, nn.BatchNorm1d(16), nn.Linear(16, 8), activation,
        nn.Linear(8, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    "model",
    [_mlp(nn.ReLU()), _mlp(nn.Tanh()), _mlp(nn.PReLU(init=1.5)), _Swish(), _Max()],
    ids=["relu", "tanh", "prelu", "swish", "max"],
)
def test_at_least_the_norms_at_samples(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(40, 4, generator=generator)
    plan = lipfast.compile(model.eval(), x)
    for norm in _NORMS:
        found = plan.bounds(model.state_dict(), x, norm=norm, floor=True, effort=1)
        assert found.floor is not None
        assert found.floor.value >= found.lower.jacobian.value * (1 - 1e-5)
        assert found.floor.value <= found.upper.value


class _Sizes(nn.Module):
    """An extremum in other words, whose own nodes nothing reads, and a token beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.full((1, 1, 4), 2.0))
        self.first, self.last = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(torch.cat([self.token.expand(x.shape[0], -1, -1), x[:, None]], 1))
        p, q = h[..., :3], h[..., 3:]
        return self.last((p + q + (p - q).abs()) / 2).mean(1)


class _Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.token.expand(x.shape[0], -1)


def test_nodes_that_nothing_reads_and_tokens() -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    found = lipfast.bounds(_Sizes(), x, method="quadratic", floor=True)
    assert found.floor is not None
    assert found.lower.value * (1 - 1e-5) <= found.floor.value <= found.upper.value
    assert found.floor.reason is None


def test_many_networks_are_as_one() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    generator = torch.Generator().manual_seed(0)
    weights = [
        {n: torch.randn(p.shape, generator=generator) for n, p in model.state_dict().items()}
        for _ in range(3)
    ]
    plan, x = lipfast.compile(model, torch.zeros(2, 3)), torch.randn(9, 3, generator=generator)
    together = [found.floor.value for found in plan.bounds(weights, x, floor=True)]  # type: ignore[union-attr]
    alone = [plan.bounds(own, x, floor=True).floor.value for own in weights]  # type: ignore[union-attr]
    assert together == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), "softmax in module '1' knows no slopes"),
        (nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), "layer_norm"),
        (_Constant(), "the output does not depend on the input"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3, 3), nn.Unflatten(1, (1, 3)), nn.MaxPool1d(2)),
         "max_pool1d"),
    ],
)  # fmt: skip
def test_without_slopes_there_is_none(model: nn.Module, why: str) -> None:
    found = lipfast.bounds(model, torch.randn(4, 3), floor=True)
    assert found.floor is not None
    assert found.floor.value == 0.0
    assert why in str(found.floor.reason)
    assert why in repr(found)


def test_huge_weights_give_an_honest_answer() -> None:
    model = _chain(0, 2, 3, 3, 2)
    for layer in model[::2]:
        layer.weight.data.mul_(1e150)
    floor = _floor(model)
    assert floor.value == 0.0
    assert "float64" in str(floor.reason)


def test_says_what_it_is() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    found = lipfast.bounds(model, torch.randn(5, 2), floor=True)
    for text in (repr(found), str(found), repr(found.upper), str(found.upper)):
        assert "no bound that ignores reachability can be below" in text
    assert "not a bound of the Lipschitz constant" in " ".join(str(found).split())
    assert found.floor is not None
    assert found.floor.side == "floor"
    assert lipfast.bounds(model, torch.randn(5, 2)).floor is None


def test_options() -> None:
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    assert lipfast.bounds(model, x, floor=True).floor.value > 0  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match="floor must be True or False, not str"):
        lipfast.bounds(model, x, floor="yes")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"no option 'floor'; it is an option of bounds, Plan"):
        lipfast.upper_bound(model, x, floor=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("interrupt", [False, True])
def test_leaves_everything_as_it_was(interrupt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(5, 2)
    state = torch.get_rng_state()
    if interrupt:
        monkeypatch.setattr(
            "lipfast.estimators.floor.search.steepest_direction",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            lipfast.bounds(model, x, floor=True)
    else:
        with torch.inference_mode():
            assert lipfast.bounds(model, x, floor=True).floor.value > 0  # type: ignore[union-attr]
        with torch.no_grad(), torch.autocast("cpu"):
            assert lipfast.bounds(model, x, floor=True).floor.value > 0  # type: ignore[union-attr]
            assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
