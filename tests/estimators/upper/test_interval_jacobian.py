"""The interval Jacobian of graphs: never below any slopes' Jacobian, never above the product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.domain import Box
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper import interval_jacobian, interval_jacobian_balls
from lipfast.estimators.upper.interval_jacobian import INTERVAL_JACOBIAN
from lipfast.rules import RULES
from tests.support.explicit import Function

NORMS = (1, math.inf)
Exact = list[list[Fraction]]


def product_of(plan: Plan, state: dict[str, Tensor], norm: float) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lipfast.estimators.upper.spectral_product.interval_jacobians", no_bounds)
        return plan.upper(state, norm=norm).value


def no_bounds(*arguments: object) -> None:
    return None


def linear(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


class Residual(nn.Module):
    """W3 s2(h + V s1(U h)), h = W x."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.w, self.u, self.v = nn.Linear(2, width), nn.Linear(width, 2), nn.Linear(2, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        return self.out(torch.relu(h + self.v(nn.functional.gelu(self.u(h)))))

    def jacobian(self, slopes: list[list[Fraction]]) -> Exact:
        w, u, v, out = (exact(layer.weight) for layer in (self.w, self.u, self.v, self.out))
        inner = times(v, scaled(slopes[0], u))
        return times(out, scaled(slopes[1], times(plus(identity(len(w)), inner), w)))


class Joined(nn.Module):
    """W2 [s1(W x); x - s2(x) / 2], permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.out = nn.Linear(2, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat(
            [nn.functional.gelu(self.w(x)), x - 0.5 * torch.relu(x.flip(1)).flip(1)], 1
        )
        return self.out(joined.reshape(-1, 2, 2).transpose(1, 2).flatten(1))

    def jacobian(self, slopes: list[list[Fraction]]) -> Exact:
        w, out = exact(self.w.weight), exact(self.out.weight)
        rest = plus(identity(2), scaled([-s / 2 for s in slopes[1]], identity(2)))
        rows = [*scaled(slopes[0], w), *rest]
        return times(out, [rows[i] for i in (0, 2, 1, 3)])


class Several(nn.Module):
    """Two inputs and two outputs: W2 s(W x + V z), and s(W x + V z) - 3 z."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.out = nn.Linear(1, 2), nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.w(x) + self.v(z))
        return self.out(nn.functional.gelu(a)), torch.sub(a, z, alpha=3)

    def jacobian(self, slopes: list[list[Fraction]]) -> Exact:
        first = [a + b for a, b in zip(exact(self.w.weight), exact(self.v.weight), strict=True)]
        a = scaled(slopes[1], first)
        direct = [[Fraction(0), *(-3 * e for e in row)] for row in identity(2)]
        return [*times(exact(self.out.weight), scaled(slopes[0], a)), *plus(a, direct)]


def exact(matrix: Tensor) -> Exact:
    return [[Fraction(entry) for entry in row] for row in matrix.detach().double().tolist()]


def identity(size: int) -> Exact:
    return [[Fraction(int(i == j)) for j in range(size)] for i in range(size)]


def plus(a: Exact, b: Exact) -> Exact:
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def times(a: Exact, b: Exact) -> Exact:
    columns = list(zip(*b, strict=True))
    return [
        [sum(map(Fraction.__mul__, row, column), Fraction()) for column in columns] for row in a
    ]


def scaled(slopes: list[Fraction], a: Exact) -> Exact:
    return [[slope * entry for entry in row] for slope, row in zip(slopes, a, strict=True)]


def largest(jacobian: Exact, norm: float) -> Fraction:
    rows = jacobian if math.isinf(norm) else list(zip(*jacobian, strict=True))
    return max(sum(map(abs, row), Fraction()) for row in rows)


def sampled(model: nn.Module, x: Tensor, norm: float) -> float:
    """The largest norm of the Jacobian at samples."""
    x = x.detach().requires_grad_()
    outputs = model(x).flatten(1).sum(0)
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0].flatten(1) for y in outputs]
    return float(torch.linalg.matrix_norm(torch.stack(rows, 1), norm).max())


GELU = [Fraction(lipfast.rules.pointwise.GELU), 1 - Fraction(lipfast.rules.pointwise.GELU)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [Residual, Joined, Several])
@pytest.mark.parametrize("size", [1.0, 1e150, 1e-150])
def test_never_below_all_corner_slopes(
    make: Callable[[], nn.Module], norm: float, size: float, generator: torch.Generator
) -> None:
    for _ in range(4):
        model = make().double()
        with torch.no_grad():
            for index, weight in enumerate(model.parameters()):
                weight.normal_(generator=generator)
                weight.mul_(size if index % 4 == 0 else 1.0 / size if index % 4 == 2 else 1.0)
        shapes = [(2, 1), (2, 2)] if make is Several else [(2, 2)]
        plan = Plan.trace(model, [torch.zeros(shape, dtype=torch.float64) for shape in shapes])
        found = plan.upper(model.state_dict(), norm=norm)
        assert found.certified
        if size == 1.0 and make is not Several:  # whose largest row may be the product's
            assert found.method == INTERVAL_JACOBIAN
        corners = itertools.product(
            GELU, GELU, [Fraction(0), Fraction(1)], [Fraction(0), Fraction(1)]
        )
        truth = max(
            largest(model.jacobian([list(corner[:2]), list(corner[2:])]), norm)  # type: ignore[operator]
            for corner in corners
        )
        assert Fraction(found.value) >= truth
        assert found.value <= product_of(plan, model.state_dict(), norm)


ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 2.0),
    "leaky": nn.LeakyReLU(-0.5),
    "prelu": nn.PReLU(8, init=-0.3),
    "rrelu": nn.RReLU(),
    "elu": nn.ELU(-1.5),
    "selu": nn.SELU(),
    "celu": nn.CELU(0.4),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardswish": nn.Hardswish(),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softsign": nn.Softsign(),
    "logsigmoid": nn.LogSigmoid(),
    "softshrink": nn.Softshrink(0.3),
    "softplus": nn.Softplus(),
    "sine": Function(torch.sin),
    "abs": Function(torch.abs),
    "neg and scale": Function(lambda x: -torch.relu(x) * 0.7 + 1.0),
    "composition": Function(lambda x: x * torch.sigmoid(1.7 * x)),
    "two": nn.Sequential(nn.Tanh(), nn.ELU(-0.5), nn.LeakyReLU(0.1)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_activation_between_sampled_jacobians_and_the_product(name: str, norm: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        act = ACTIVATIONS[name]
        layers = nn.Linear(3, 8), act, nn.Linear(8, 8), act, nn.Linear(8, 4)
        model = nn.Sequential(*layers).double().eval()
        x = 3 * torch.randn(400, 3, dtype=torch.float64)
    plan = Plan.trace(model, x[:2])
    found = plan.upper(model.state_dict(), norm=norm)
    assert found.method == INTERVAL_JACOBIAN
    assert found.certified
    assert (
        sampled(model, x, norm) * (1 - 1e-12)
        <= found.value
        < product_of(plan, model.state_dict(), norm)
    )


def by_torch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(interval_jacobian, "_chain_of", no_bounds)


def stack(generator: torch.Generator) -> nn.Sequential:
    model = nn.Sequential(
        *(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.GELU(), nn.Linear(9, 7, bias=False)),
        *(nn.Linear(7, 6), nn.PReLU(6), nn.Flatten(), nn.Linear(6, 3), nn.Softplus()),
    )
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
                if "running_var" in name:
                    tensor.abs_()
    return model.eval()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_the_kernel_and_torch_agree(
    norm: float,
    dtype: torch.dtype,
    count: int,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BatchNorm is folded, maps are merged, PReLU has slopes of its own in every network."""
    models = [stack(generator) for _ in range(count)]
    plan = Plan.trace(models[0], torch.zeros(2, 5))
    states = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        for model in models
    ]
    native = [bound.value for bound in plan.upper(states, norm=norm)]
    by_torch(monkeypatch)
    assert [b.value for b in plan.upper(states, norm=norm)] == pytest.approx(native, rel=1e-9)
    monkeypatch.setattr(interval_jacobian, "_BATCH_BYTES", 1)
    assert [b.value for b in plan.upper(states, norm=norm)] == pytest.approx(native, rel=1e-9)
    for state, value in zip(states, native, strict=True):
        assert value < product_of(plan, state, norm)


@pytest.mark.parametrize("norm", NORMS)
def test_without_its_terms_for_rounding_torch_would_be_below(
    norm: float, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_torch(monkeypatch)
    model = nn.Sequential(nn.Linear(1, 7, bias=False), nn.Softsign(), nn.Linear(7, 1, bias=False))
    plan = Plan.trace(model.double(), torch.zeros(2, 1, dtype=torch.float64))
    ends = [Fraction(0), Fraction(1)]
    below = {True: 0, False: 0}
    for proved in below:
        if not proved:
            monkeypatch.setattr(interval_jacobian_balls, "_HULL", 0.0)
            monkeypatch.setattr(interval_jacobian_balls, "UNDERFLOW", 0.0)
            monkeypatch.setattr(interval_jacobian_balls, "gamma", lambda count: 0.0)
            monkeypatch.setattr(interval_jacobian_balls, "widened", lambda x, count: x)
        for _ in range(60):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.normal_(generator=generator)
            first, second = (exact(weight) for weight in model.parameters())
            paths = [a * b[0] for a, b in zip(second[0], first, strict=True)]
            truth = max(
                abs(sum(pick(sorted(s * p for s in ends)) for p in paths)) for pick in (min, max)
            )
            below[proved] += Fraction(plan.upper(model.state_dict(), norm=norm).value) < truth
    assert below[True] == 0
    assert below[False] > 5


class Normalised(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6))
        self.weight = nn.Parameter(torch.randn(6, 4, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ (self.weight / 3)


@pytest.mark.parametrize("norm", NORMS)
def test_computed_and_transposed_weights(norm: float, generator: torch.Generator) -> None:
    model = Normalised(generator).double()
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    found = plan.upper(model.state_dict(), norm=norm)
    x = torch.randn(300, 3, dtype=torch.float64, generator=generator)
    assert found.method == INTERVAL_JACOBIAN
    assert (
        sampled(model, x, norm) * (1 - 1e-12)
        <= found.value
        < product_of(plan, model.state_dict(), norm)
    )


@pytest.mark.parametrize("norm", NORMS)
def test_tokens_and_copies(norm: float, generator: torch.Generator) -> None:
    """A map of every token, entries that are read twice, zeros around, a row that is dropped."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 3), nn.Linear(15, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.b(torch.tanh(self.a(x)))
            x = nn.functional.pad(x, (0, 0, 1, 1))
            x = torch.cat([x[:, 1:4], x[:, 1:3]], 1)
            return self.c(torch.relu(x).permute(0, 2, 1).flatten(1))

    model = Tokens().double()
    x = torch.randn(200, 4, 3, dtype=torch.float64, generator=generator)
    plan = Plan.trace(model, x[:2])
    found = plan.upper(model.state_dict(), norm=norm)
    assert found.method == INTERVAL_JACOBIAN
    assert (
        sampled(model, x, norm) * (1 - 1e-12)
        <= found.value
        <= product_of(plan, model.state_dict(), norm)
    )


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)),
        nn.Sequential(nn.Linear(4, 4), nn.Hardshrink(), nn.Linear(4, 2)),
        nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 2)),
        nn.ReLU(),
    ],
    ids=["softmax", "jump", "convolution", "no layer"],
)
def test_other_graphs_have_the_product(model: nn.Module) -> None:
    plan = Plan.trace(model, torch.zeros(2, 4))
    for norm in NORMS:
        found = plan.upper(model.state_dict(), norm=norm)
        assert "product" in found.method
        assert found.value == product_of(plan, dict(model.state_dict()), norm)


def test_what_is_too_large_has_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = Plan.trace(model, torch.zeros(2, 4))
    assert plan.upper(model.state_dict(), norm=1).method == INTERVAL_JACOBIAN
    for name in ("_MOST_PRODUCTS", "_BYTES_OF_ONE"):
        with monkeypatch.context() as patch:
            patch.setattr(interval_jacobian, name, 10)
            assert "product" in plan.upper(model.state_dict(), norm=1).method


def test_the_smaller_of_both_and_the_published_product() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = Plan.trace(model, torch.zeros(2, 4))
    state = model.state_dict()
    found = plan.upper(state, norm=1)
    assert found.value < product_of(plan, state, 1)
    assert found.layers == plan.upper(state, norm=1, simplify=False).layers
    assert "product" in plan.upper(state, norm=1, simplify=False).method
    assert "product" in plan.upper(state, norm=2).method
    assert found.composition.total.value == product_of(plan, state, 1)
    assert found.log_value >= math.log(found.value)
    near = plan.upper(state, norm=1, domain=Box(0, 1))
    assert near.value < found.value


def test_all_that_bounds_from_above_has_it() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    plan = Plan.trace(model, x)
    value = plan.upper(model.state_dict(), norm="inf").value
    assert lipfast.upper_bound(model, x, norm="inf").value == value
    assert lipfast.bounds(model, x, norm="inf").upper.value == value
    assert plan.tracker(norm="inf").upper(model.state_dict()).value == value


def test_a_users_rule_needs_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plan = Plan.trace(model, torch.zeros(2, 4))
    before = plan.upper(model.state_dict(), norm=1)
    shipped = RULES["aten.tanh"]
    try:
        lipfast.rule("aten.tanh")(lambda call: call.input)
        assert "product" in plan.upper(model.state_dict(), norm=1).method
        lipfast.rule("aten.tanh", slopes=(0, 1))(lambda call: call.input)
        found = plan.upper(model.state_dict(), norm=1)
        assert found.method == INTERVAL_JACOBIAN
        assert found.value == before.value
        assert found.given == ("aten.tanh",)
    finally:
        RULES["aten.tanh"] = shipped
