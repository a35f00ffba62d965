"""What activations read on a domain lies in the ranges that are found, in exact arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.domain import Ball, Box, Domain
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.local import around
from lipfast.estimators.upper.local import ranges as module
from lipfast.estimators.upper.local.ranges import Ranges, ranges_on_domain, slopes_on_domain
from lipfast.estimators.upper.quadratic import graph_linear

MEMORY = 1 << 26
Rows = list[list[Fraction]]


def ranges_of(plan: Plan, model: nn.Module, domain: Domain) -> Ranges:
    found = ranges_on_domain(plan, plan.resolve(model.state_dict()), domain, memory=MEMORY)
    assert found is not None
    return found


def exact(matrix: Tensor) -> Rows:
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


def product(first: Rows, second: Rows) -> Rows:
    columns = list(zip(*second, strict=True))
    return [[sum(map(Fraction.__mul__, row, col), Fraction()) for col in columns] for row in first]


def linear_regions(count: int) -> Sequence[tuple[nn.Sequential, Box]]:
    """Networks all of whose ReLUs are on, and whose products of weights nearly vanish."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, own: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=own, dtype=torch.float64)

        modules: list[nn.Module] = []
        for index in range(4):
            layer = nn.Linear(2, 2).double()
            row = random(1, 2) if index % 2 == 0 else torch.tensor([[1.0, -1.0]]).double()
            layer.weight.data.copy_(random(2, 1) * row * (1 + 1e-9 * random(2, 2)))
            if index % 2 == 0:  # rows that are nearly the same
                layer.weight.data.copy_(row * (1 + 1e-9 * random(2, 2)))
            layer.bias.data.fill_(2.0**20)
            modules += [layer, nn.ReLU()]
        centre, radii = random(2), random(2).abs()
        found.append((nn.Sequential(*modules[:-1]), Box(centre - radii, centre + radii)))
    return found


def shortfalls(cases: Sequence[tuple[nn.Sequential, Box]]) -> int:
    """How many ends of ranges are within the true ones, in rational numbers."""
    count, plan = 0, Plan.trace(cases[0][0], torch.zeros(2, 2, dtype=torch.float64))
    for model, box in cases:
        found = ranges_of(plan, model, box)
        low, high = box._limits((2,))
        centre = exact(box.middle((2,))[:, None])
        total: Rows | None = None
        for passed, layer in zip(found.passed, model[::2], strict=False):
            weight = exact(layer.weight.detach())
            total = weight if total is None else product(weight, total)
            for own, least, most in zip(
                total, passed.read.low.tolist(), passed.read.high.tolist(), strict=True
            ):
                terms = [
                    [w * (Fraction(end) - c[0]) for end in ends]
                    for w, c, *ends in zip(own, centre, low.tolist(), high.tolist(), strict=True)
                ]
                count += sum(map(max, terms)) > Fraction(most)
                count += sum(map(min, terms)) < Fraction(least)
    return count


def test_ranges_of_linear_regions_hold_in_rational_numbers() -> None:
    assert shortfalls(linear_regions(20)) == 0


def test_rounding_has_teeth(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (module, around):
        monkeypatch.setattr(part, "widened", lambda x, _: x)
        monkeypatch.setattr(part, "UNDERFLOW", 0.0)
    monkeypatch.setattr(module, "gamma", lambda _: 0.0)
    # Of coefficients, whose errors are those of products with unit vectors: there are none.
    monkeypatch.setattr(graph_linear, "node_error", lambda *given: torch.zeros_like(given[3]))
    assert shortfalls(linear_regions(20)) > 10


def mlp(
    act: Callable[[], nn.Module], seed: int, sizes: Sequence[int] = (3, 5, 6, 4, 2)
) -> nn.Module:
    torch.manual_seed(seed)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*modules[:-1]).double()


def points_of(domain: Domain, count: int, size: int) -> Tensor:
    """In the domain, half of them at its border."""
    generator = torch.Generator().manual_seed(count)
    middle = domain.middle((size,))
    if isinstance(domain, Box):
        low, high = domain._limits((size,))
        share = torch.rand(count, size, generator=generator, dtype=torch.float64)
        share[::2] = share[::2].round()
        return torch.minimum(torch.maximum(low + share * (high - low), low), high)
    moved = torch.randn(count, size, generator=generator, dtype=torch.float64)
    moved = moved / moved.norm(dim=1, keepdim=True)
    moved[1::2] *= torch.rand(len(moved[1::2]), 1, generator=generator, dtype=torch.float64)
    return middle + moved * (domain.radius * (1 - 1e-12))


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    nn.GELU,
    nn.Tanh,
    nn.SiLU,
    nn.PReLU,
    nn.Hardtanh,
    nn.Hardswish,
    lambda: nn.ELU(-1.5),
]
DOMAINS: list[Domain] = [
    Ball(0.5, torch.tensor([0.3, -1.0, 2.0])),
    Ball(20.0),
    Box(torch.tensor([-1.0, 0.5, 0.0]), torch.tensor([-0.5, 0.5, 3.0])),
]


def left_ranges(model: nn.Module, domain: Domain) -> int:
    """How many entries that activations read leave their ranges, over points of the domain."""
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    found = ranges_of(plan, model, domain)
    points, centre = points_of(domain, 400, 3), domain.middle((3,))[None]
    count, layers = 0, iter(found.passed)
    for layer in model.children():
        if not isinstance(layer, nn.Linear):
            passed = next(layers)
            moved = points - centre
            slack = 1e-12 * (1 + points.abs())
            count += int((moved > passed.read.high + slack).sum())
            count += int((moved < passed.read.low - slack).sum())
        points, centre = layer(points), layer(centre)
    return count


@torch.no_grad()
@pytest.mark.parametrize("domain", DOMAINS, ids=repr)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nothing_leaves_its_range(act: Callable[[], nn.Module], domain: Domain) -> None:
    assert left_ranges(mlp(act, 0), domain) == 0


@torch.no_grad()
def test_ranges_of_half_a_domain_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = around.AroundCentre.reach
    monkeypatch.setattr(around.AroundCentre, "reach", lambda self, rows: whole(self, rows) / 2)
    assert left_ranges(mlp(nn.ReLU, 0), DOMAINS[0]) > 0


def slopes_of(model: nn.Module, domain: Domain, size: int) -> list[tuple[Tensor, Tensor]]:
    plan = Plan.trace(model, torch.zeros(2, size, dtype=torch.float64))
    entry = plan.resolve(model.state_dict())
    return list(slopes_on_domain(plan, entry, domain, memory=MEMORY).values())


def test_units_are_off_on_or_free() -> None:
    layer = nn.Linear(1, 4, bias=False).double()
    layer.weight.data.copy_(torch.tensor([[1.0], [-1.0], [1.0], [0.0]]))
    layer.bias = nn.Parameter(torch.tensor([0.0, 0.0, -1.5, 0.0], dtype=torch.float64))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 1).double())
    ((low, high),) = slopes_of(model, Box(1.0, 2.0), 1)
    assert low[:3].tolist() == [1.0, 0.0, 0.0]
    assert high[:3].tolist() == [1.0, 0.0, 1.0]


def test_of_a_point_the_derivative_is_known() -> None:
    model = mlp(nn.Tanh, 1)
    x = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    for domain in (Ball(0.0, x), Box(x, x)):
        for low, high in slopes_of(model, domain, 3):
            assert float((high - low).max()) < 1e-10


def test_products_that_underflow_between_large_numbers_are_not_lost() -> None:
    """``2^-500 relu(2^-600 x)`` for x up to 2^290: the product of the weights is 0 in float64."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1), nn.ReLU()).double()
    for layer, weight in ((model[0], 2.0**-600), (model[2], 2.0**-500)):
        layer.weight.data.fill_(weight)
        layer.bias.data.zero_()
    plan = Plan.trace(model, torch.zeros(2, 1, dtype=torch.float64))
    last = ranges_of(plan, model, Box(0.0, 2.0**290)).passed[-1]
    # From the centre on; 2^290 2^-600 2^-500 / 2.
    assert float(last.read.high) >= 2.0**-811


def test_of_a_domain_beyond_all_numbers_the_rules_say_all() -> None:
    model = mlp(nn.ReLU, 1)
    assert slopes_of(model, Box(-1e305, 1e305), 3) == []
    for low, high in slopes_of(model, Ball(1e60), 3):
        assert bool((low == 0).all())
        assert bool((high == 1).all())


def test_bounds_of_corners_hold_for_slopes_on_the_domain() -> None:
    """All products of weights with slopes at the ends of their ranges, norms 1, 2 and inf."""
    for seed in range(4):
        model = mlp(nn.ReLU, seed, (2, 3, 3, 2))
        domain = Ball(0.3 + 0.2 * seed, torch.full((2,), 0.1 * seed))
        plan = Plan.trace(model, torch.zeros(2, 2, dtype=torch.float64))
        slopes = slopes_of(model, domain, 2)
        weights = [layer.weight.detach() for layer in model.children() if hasattr(layer, "weight")]
        ends = [low.tolist() + high.tolist() for low, high in slopes]
        choices = [
            list(itertools.product(*({own[j], own[j + 3]} for j in range(3)))) for own in ends
        ]
        jacobians = torch.stack(
            [
                weights[2]
                @ (torch.tensor(b).double()[:, None] * weights[1])
                @ (torch.tensor(a).double()[:, None] * weights[0])
                for a, b in itertools.product(*choices)
            ]
        )
        for norm in (1, 2, float("inf")):
            largest = float(torch.linalg.matrix_norm(jacobians, norm).max())
            for method in ("product", "quadratic"):
                upper = plan.upper(model.state_dict(), norm=norm, method=method, domain=domain)
                assert upper.value >= largest * (1 - 1e-14)
                assert upper.certified


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.read, self.write = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.last, self.norm = nn.Linear(6, 2), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        x = x + self.write(nn.functional.gelu(self.read(x)))
        out: Tensor = self.last(torch.maximum(x, x.flip(1)))
        return out


def _convolutional() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 12)), nn.Conv1d(1, 3, 3), nn.ReLU(), nn.MaxPool1d(2)),
        *(nn.Conv1d(3, 4, 3), nn.SiLU(), nn.AvgPool1d(3), nn.Flatten(), nn.Linear(4, 2)),
    )


@pytest.mark.parametrize(("model", "size"), [(_Residual, 3), (_convolutional, 12)])
def test_graphs(model: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(2)
    network = model().double().eval()
    x = torch.zeros(1, size).double()
    everywhere = lipfast.upper_bound(network, x, method="quadratic").value
    for domain in (Ball(0.05, 0.4), Box(0.35, 0.5)):
        x = points_of(domain, 300, size)
        upper = lipfast.upper_bound(network, x, method="quadratic", domain=domain)
        with torch.no_grad():
            y = network(x)
        moved, moves = (x[:150] - x[150:]).norm(dim=1), (y[:150] - y[150:]).norm(dim=1)
        assert bool((moves <= upper.value * moved).all())
        assert upper.value < 0.93 * everywhere
        assert upper.certified
        assert upper.certificate is None


@pytest.mark.parametrize("call", ["upper", "tracker"])
def test_no_certificate_where_the_domain_says_nothing_of_slopes(call: str) -> None:
    """For want of memory, or of numbers within float64; it would be one of all inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    plan, weights = lipfast.compile(model, torch.zeros(1, 3).double()), model.state_dict()
    large = {name: 1e150 * value for name, value in weights.items()}
    for own, memory in ((weights, 1), (large, 1 << 30)):
        options: dict[str, Any] = {"method": "quadratic", "memory": memory}
        everywhere = plan.upper(own, **options)
        options["domain"] = Box(-0.1, 0.1)
        found = (
            plan.upper(own, **options) if call == "upper" else plan.tracker(**options).upper(own)
        )
        assert everywhere.certificate is not None
        assert found.log_value == everywhere.log_value
        assert found.certificate is None


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(2, 5), nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.first(x) + self.second(y)))
        return out


def test_a_ball_is_of_all_inputs_together() -> None:
    torch.manual_seed(0)
    model = _TwoInputs().double()
    inputs = torch.zeros(2, 2).double(), torch.zeros(2, 3).double()
    plan = Plan.trace(model, inputs)
    entry = plan.resolve(model.state_dict())
    weight = torch.cat([model.first.weight, model.second.weight], 1).detach()
    for domain, expected in (
        (Ball(0.5), 0.5 * weight.norm(dim=1)),
        (Box(-0.5, 0.5), 0.5 * weight.abs().sum(1)),
    ):
        found = ranges_on_domain(plan, entry, domain, memory=MEMORY)
        assert found is not None
        torch.testing.assert_close(found.passed[0].read.high, expected, rtol=1e-12, atol=0)


def test_many_networks_are_as_one_by_one() -> None:
    models = [mlp(nn.ReLU, seed) for seed in range(3)]
    plan = Plan.trace(models[0], torch.zeros(2, 3, dtype=torch.float64))
    states = [model.state_dict() for model in models]
    domain = Ball(0.4, 0.2)
    for norm in (1, 2, float("inf")):
        options = {"norm": norm, "method": "quadratic", "domain": domain}
        together = plan.upper(states, **options)
        alone = [plan.upper(state, **options) for state in states]
        assert [bound.value for bound in together] == pytest.approx(
            [bound.value for bound in alone], rel=1e-6
        )


class _WrittenOut(nn.Module):
    """Functions of several ops, of which one is a part of another, and a BatchNorm that folds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x))
        g = h * torch.sigmoid(h)
        out: Tensor = self.last(g + 0.1 * g * g / (1 + g * g))
        return out


def test_functions_of_several_ops_in_all_norms() -> None:
    torch.manual_seed(4)
    model = _WrittenOut().double().eval()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.2, 3)
    domain = Ball(0.1, 0.3)
    x = points_of(domain, 200, 3)
    with torch.no_grad():
        y = model(x)
    for norm, method in ((1, "product"), (2, "quadratic"), (float("inf"), "product")):
        near, everywhere = (
            lipfast.upper_bound(model, x, norm=norm, method=method, domain=own).value
            for own in (domain, None)
        )
        moved = torch.linalg.vector_norm(x[:100] - x[100:], norm, dim=1)
        moves = torch.linalg.vector_norm(y[:100] - y[100:], norm, dim=1)
        assert bool((moves <= near * moved * (1 + 1e-12)).all())
        assert near < 0.9 * everywhere
