"""Sums and joins of different parts of one activation, and maxima beside minima."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.domain import Box
from lipfast.estimators.plan import Plan
from tests.support.explicit import NORMS, Function, check_quotients, matrix_of, traced


class Two(nn.Module):
    """A function of two linear layers and the input; their norms are 2 and 3."""

    def __init__(self, function: Callable[[Two, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
            self.b.weight.copy_(torch.diag(torch.tensor([1.0, -3.0])))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def both(first: Tensor, second: Tensor, model: Two, dim: int = 1) -> Tensor:
    return torch.cat([model.a(first), model.b(second)], dim)


def in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    first, second = x.chunk(2, 1)
    return first, second


DISJOINT: dict[str, Callable[[Two, Tensor], Tensor]] = {
    "chunk": lambda m, x: both(*in_two(x), m),
    "split": lambda m, x: both(*x.split(2, 1), m),
    "slices": lambda m, x: both(x[:, :2], x[:, 2:], m),
    "narrow": lambda m, x: both(x.narrow(1, 0, 2), x.narrow(-1, -2, 2), m),
    "every other": lambda m, x: both(x[:, ::2], x[:, 1::2], m),
    "indices": lambda m, x: both(x[:, [0, 3]], x[:, [2, 1]], m),
    "index_select": lambda m, x: both(
        x.index_select(1, torch.tensor([3, 1])), x.index_select(1, torch.tensor([0, 2])), m
    ),
    "unbind": lambda m, x: both(*x.reshape(-1, 2, 2).unbind(1), m),
    "select": lambda m, x: both(x.view(-1, 2, 2)[:, 0], x.view(-1, 2, 2)[:, 1], m),
    "transposed": lambda m, x: both(
        x.view(-1, 2, 2)[:, :, 0], x.view(-1, 2, 2).transpose(1, 2)[:, 1], m
    ),
    "stack": lambda m, x: torch.stack([m.a(x[:, :2]), m.b(x[:, 2:])], 2),
    "padded": lambda m, x: both(
        nn.functional.pad(x[:, :1], (1, 0)), nn.functional.pad(x[:, 2:3], (0, 1)), m
    ),
    "parts of parts": lambda m, x: torch.cat(
        [2 * in_two(x)[0][:, :1], m.b(in_two(x)[1]), in_two(x)[0][:, 1:]], 1
    ),
}


@pytest.mark.parametrize("name", DISJOINT)
def test_disjoint_parts_count_once(name: str) -> None:
    model = Two(DISJOINT[name])
    plan = traced(model, (4,))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix_of(model, (4,)), norm))
        bound = plan.upper(model.state_dict(), norm=norm)
        assert bound.certified
        assert truth <= bound.value <= 3.0 * (1 + 1e-6)
        assert sum(bound.composition.sources(len(bound.layers)).layers) <= bound.log_value + 1e-9


OVERLAPPING: dict[str, Callable[[Two, Tensor], Tensor]] = {
    "the same half": lambda m, x: both(x[:, :2], x[:, :2], m),
    "a common entry": lambda m, x: both(x[:, :2], x[:, 1:3], m),
    "all and a half": lambda m, x: torch.cat([x, 3 * x[:, 2:]], 1),
    "coupling": lambda m, x: torch.cat([in_two(x)[0], in_two(x)[1] + m.b(in_two(x)[0])], 1),
    "sum of halves": lambda m, x: m.a(in_two(x)[0]) + m.b(in_two(x)[1]),
    "difference of halves": lambda m, x: m.a(in_two(x)[0]) - 2 * m.b(in_two(x)[1]),
    "mixed before": lambda m, x: both((x + x.flip(1))[:, :2], x[:, 2:], m),
    "joined twice": lambda m, x: torch.cat([both(x[:, :2], x[:, 2:], m), x], 1),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_parts_that_overlap_are_not_taken_for_disjoint(name: str) -> None:
    model = Two(OVERLAPPING[name])
    plan = traced(model, (4,))
    matrix = matrix_of(model, (4,))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        assert truth <= plan.upper(model.state_dict(), norm=norm).value


def test_sums_of_parts_have_the_dual_norm() -> None:
    model = Two(OVERLAPPING["sum of halves"])
    plan = traced(model, (4,))
    values = [plan.upper(model.state_dict(), norm=norm).value for norm in (1, 2, math.inf)]
    assert values == pytest.approx([3.0, math.sqrt(13.0), 5.0], rel=1e-6)


def test_products_of_parts_on_a_box() -> None:
    plan = traced(Function(lambda x: x[:, 0] * x[:, 1]), (2,))
    box = Box(torch.tensor([0.9, 1.9]), torch.tensor([1.1, 2.1]))
    for norm, truth in ((1, 2.1), (2, math.hypot(1.1, 2.1)), (math.inf, 3.2)):
        bound = plan.upper({}, norm=norm, domain=box).value
        assert truth * (1 - 1e-6) <= bound <= truth * 1.01  # the ends are numbers of float32


def ordered(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([torch.max(first, second), torch.min(first, second)], 1)


def chosen(first: Tensor, second: Tensor) -> Tensor:
    larger = first > second
    return torch.cat([torch.where(larger, first, second), torch.where(larger, second, first)], 1)


def by_size(first: Tensor, second: Tensor) -> Tensor:
    mean, half = (first + second) / 2, (first - second).abs() * 0.5
    return torch.cat([mean + half, mean - half], 1)


def by_size_halved_last(first: Tensor, second: Tensor) -> Tensor:
    size = torch.abs(second - first)
    return torch.cat([0.5 * (first + second + size), (first + second - size) / 2], 1)


SORTING: dict[str, Callable[[Tensor], Tensor]] = {
    "max and min": lambda x: ordered(*in_two(x)),
    "min and max, stacked": lambda x: torch.stack(
        [torch.minimum(*in_two(x)), torch.maximum(*in_two(x))], 1
    ),
    "fmax and fmin": lambda x: torch.cat([torch.fmax(*in_two(x)), torch.fmin(*in_two(x))], 1),
    "where": lambda x: chosen(*in_two(x)),
    "pairs beside each other": lambda x: torch.stack(
        [torch.max(x[:, ::2], x[:, 1::2]), torch.min(x[:, ::2], x[:, 1::2])], -1
    ).flatten(1),
    "reduced": lambda x: torch.cat([x.view(-1, 2, 2).max(-1)[0], x.view(-1, 2, 2).min(-1)[0]], 1),
    "amax and amin": lambda x: torch.cat([x.view(-1, 2, 2).amax(1), x.view(-1, 2, 2).amin(1)], 1),
    "sort": lambda x: x.reshape(-1, 2, 2).sort(-1)[0].flatten(1),
    "sorted downward": lambda x: torch.sort(x, dim=1, descending=True)[0],
    "largest": lambda x: x.topk(3)[0],
    "absolute half": lambda x: torch.cat([x[:, :2], x[:, 2:].abs()], 1),
    "maximum of halves": lambda x: torch.max(*in_two(x)),
    "by the size of the difference": lambda x: by_size(*in_two(x)),
    "halved last": lambda x: by_size_halved_last(*in_two(x)),
}


@pytest.mark.parametrize("name", SORTING)
def test_sorting_is_one_lipschitz(name: str) -> None:
    model = Function(SORTING[name])
    plan = traced(model, (4,))
    for norm in NORMS:
        assert plan.upper({}, norm=norm).value == 1.0
    check_quotients(plan, model, (4,))
    lower = plan.lower({}, torch.randn(20, 4, dtype=torch.float64))
    assert lower.certified
    assert 0.5 < lower.value <= 1.0


def test_a_maximum_and_a_minimum_of_one_variable_are_no_sorted_pair() -> None:
    """max(x, y) of y = x / 10 is 1-Lipschitz in x, but the pair (x, y) is not."""
    model = Function(lambda x: ordered(x, 0.1 * x))
    plan = traced(model, (3,))
    for norm in NORMS:
        truth = {1: 1.1, 2: math.sqrt(1.01), math.inf: 1.0}[norm]
        assert truth <= plan.upper({}, norm=norm).value <= truth * (1 + 1e-9)


def test_maxima_and_minima_of_different_pairs_are_not_sorted() -> None:
    model = Function(lambda x: torch.cat([torch.max(x, x.flip(1)), torch.min(x, 2 * x)], 1))
    plan = traced(model, (3,))
    assert plan.upper({}).value >= math.sqrt(1 + 4) * (1 - 1e-9)
    check_quotients(plan, model, (3,))


def test_a_rule_that_a_user_wrote_is_asked() -> None:
    before = lipfast.rules.RULES["aten.cat"]
    try:
        lipfast.rule("aten.cat")(lambda call: call.input * 7.0)
        plan = Plan.trace(Function(lambda x: torch.cat(in_two(x), 1)), torch.zeros(2, 4))
        assert plan.upper({}).value == 7.0
    finally:
        lipfast.rules.RULES["aten.cat"] = before
