"""Interval Jacobians of chains: never below any slopes' Jacobian, in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.chain_interval_jacobian import chain_interval_jacobian as op
from lipfast.reference.chain_interval_jacobian import chain_interval_jacobian as reference

Slopes = list[Tensor | None]
Exact = list[list[Fraction]]
NORMS = (1, math.inf)
BOXES = ((0.0, 1.0), (-0.129, 1.129), (0.1, 1.0), (-1.0, 1.0), (-3.0, -1.0), (1.5, 1.5))


def chain_interval_jacobian(*arguments: Any, **options: Any) -> Tensor:
    return op(*arguments, **options).norms


def chain(
    widths: Sequence[int], generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    return [
        torch.randn(out, into, generator=generator, dtype=dtype)
        for into, out in itertools.pairwise(widths)
    ]


def slopes(
    widths: Sequence[int], generator: torch.Generator, *, ends: bool = False
) -> tuple[Slopes, Slopes]:
    """One of `BOXES` for every unit; without them at both ends of the chain, unless asked for."""
    lower: Slopes = []
    upper: Slopes = []
    for index, width in enumerate(widths):
        if index in (0, len(widths) - 1) and not ends:
            lower.append(None)
            upper.append(None)
            continue
        chosen = torch.tensor(BOXES, dtype=torch.float64)[
            torch.randint(len(BOXES), (width,), generator=generator)
        ]
        lower.append(chosen[:, 0].clone())
        upper.append(chosen[:, 1].clone())
    return lower, upper


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize(
    "widths", [(3, 4), (5, 50, 50, 5), (1, 1, 1), (40, 67, 33, 19), (7, 130, 9), (2, 3, 2, 3, 1)]
)
def test_little_above_the_reference(
    widths: tuple[int, ...], ends: bool, norm: float, generator: torch.Generator, capability: str
) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        networks = [[w.to(dtype) for w in chain(widths, generator)] for _ in range(3)]
        lower, upper = slopes(widths, generator, ends=ends)
        found = chain_interval_jacobian(networks, lower, upper, norm=norm)
        for value, weights in zip(found.tolist(), networks, strict=True):
            truth = reference(weights, lower, upper, norm)
            assert truth * (1 - 1e-12) <= value <= truth * (1 + 1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_slopes_and_errors_of_each_network(norm: float, generator: torch.Generator) -> None:
    widths = (3, 17, 9, 4)
    networks = [chain(widths, generator) for _ in range(4)]
    sides = [slopes(widths, generator) for _ in range(4)]
    errors: list[list[Tensor | None]] = [
        [None, own[1].abs() * 1e-3 * (network + 1), own[2].abs() * 0.1]
        for network, own in enumerate(networks)
    ]
    lower, upper = (
        [
            None if sides[0][side][index] is None else torch.stack([s[side][index] for s in sides])  # type: ignore[misc]
            for index in range(len(widths))
        ]
        for side in (0, 1)
    )
    found = chain_interval_jacobian(networks, lower, upper, norm=norm, errors=errors)
    plain = chain_interval_jacobian(networks, lower, upper, norm=norm)
    for index, value in enumerate(found.tolist()):
        truth = reference(networks[index], *sides[index], norm, errors[index])
        assert truth * (1 - 1e-12) <= value <= truth * (1 + 1e-10)
        assert value > plain[index] * (1 + 1e-4)


def exact(matrix: Tensor) -> Exact:
    return [[Fraction(entry) for entry in row] for row in matrix.double().tolist()]


def times(a: Exact, b: Exact) -> Exact:
    columns = list(zip(*b, strict=True))
    return [
        [sum(map(Fraction.__mul__, row, column), Fraction()) for column in columns] for row in a
    ]


def largest(jacobian: Exact, norm: float) -> Fraction:
    rows = jacobian if math.isinf(norm) else list(zip(*jacobian, strict=True))
    return max(sum(map(abs, row), Fraction()) for row in rows)


def truth_of(weights: Sequence[Tensor], lower: Slopes, upper: Slopes, norm: float) -> Fraction:
    """Of all corner slopes, which hold the largest: the norm is convex in every slope."""
    hidden = [i for i, end in enumerate(lower) if end is not None]
    ends = [
        list(zip(lower[i].tolist(), upper[i].tolist(), strict=True))  # type: ignore[union-attr]
        for i in hidden
    ]
    best = Fraction()
    for corner in itertools.product(*(itertools.product(*own) for own in ends)):
        chosen = dict(zip(hidden, corner, strict=True))
        product = [
            [Fraction(int(i == j)) for j in range(weights[0].shape[1])]
            for i in range(weights[0].shape[1])
        ]
        for index in range(len(lower)):
            if index:
                product = times(exact(weights[index - 1]), product)
            if index in chosen:
                factors = map(Fraction, chosen[index])
                product = [
                    [f * entry for entry in row] for f, row in zip(factors, product, strict=True)
                ]
        best = max(best, largest(product, norm))
    return best


@pytest.mark.parametrize("sizes", [0.0, 3.0, 12.0])
@pytest.mark.parametrize("widths", [(2, 3, 2), (1, 2, 2, 1), (2, 1, 2), (1, 1, 1), (3, 2, 2, 2)])
def test_never_below_all_corner_slopes(
    widths: tuple[int, ...], sizes: float, generator: torch.Generator
) -> None:
    for trial in range(12):
        weights = chain(widths, generator)
        for weight in weights:
            spread = torch.empty(weight.shape[0], 1, dtype=torch.float64)
            weight.mul_(10 ** spread.uniform_(-sizes, sizes, generator=generator))
            weight[torch.rand(weight.shape, generator=generator) < 0.15] = 0.0
        lower, upper = slopes(widths, generator, ends=trial % 4 == 0)
        for norm in NORMS:
            found = chain_interval_jacobian([weights], lower, upper, norm=norm)
            assert Fraction(float(found)) >= truth_of(weights, lower, upper, norm)


def hidden_entries(
    weights: Sequence[Tensor], low: Tensor, high: Tensor
) -> list[tuple[Fraction, ...]]:
    """Bounds of the entries of W_2 D W_1 in exact arithmetic: least and largest."""
    first, second = (exact(weight) for weight in weights)
    found = []
    for row in second:
        for column in zip(*first, strict=True):
            products = [
                sorted((Fraction(a) * x * y, Fraction(b) * x * y))
                for a, b, x, y in zip(low.tolist(), high.tolist(), row, column, strict=True)
            ]
            found.append(tuple(sum(side, Fraction()) for side in zip(*products, strict=True)))
    return found


@pytest.mark.parametrize("box", [(-1.0, 1.0), (0.0, 1.0), (-0.129, 1.129)])
def test_roundings_are_covered_entry_by_entry(
    box: tuple[float, float], generator: torch.Generator, capability: str
) -> None:
    """Without its terms for rounding half of the entries would lie below the truth."""
    below = 0
    for _ in range(60):
        weights = [
            torch.randn(7, 1, generator=generator, dtype=torch.float64),
            torch.randn(1, 7, generator=generator, dtype=torch.float64),
        ]
        low, high = (torch.full((7,), end, dtype=torch.float64) for end in box)
        truth = max(max(abs(a), abs(b)) for a, b in hidden_entries(weights, low, high))
        found = chain_interval_jacobian([weights], [None, low, None], [None, high, None], norm=1)
        assert Fraction(float(found)) >= truth
        below += Fraction(reference(weights, [None, low, None], [None, high, None], 1)) < truth
    assert below > 10


@pytest.mark.parametrize("norm", NORMS)
def test_underflow_before_a_large_weight(norm: float) -> None:
    """The hull underflows, and what was lost is multiplied by 1e280."""
    weights = [torch.full((1, 1), value, dtype=torch.float64) for value in (1e280, 1e-200)]
    for low, high in ((0.0, 3e-124), (-3e-124, 0.0), (1e-124, 3e-124)):
        lower, upper = (torch.full((1,), end, dtype=torch.float64) for end in (low, high))
        found = chain_interval_jacobian(
            [weights], [None, lower, None], [None, upper, None], norm=norm
        )
        largest_slope = max(abs(Fraction(low)), abs(Fraction(high)))
        assert Fraction(float(found)) >= largest_slope * Fraction(1e-200) * Fraction(1e280)


@pytest.mark.parametrize("norm", NORMS)
def test_products_underflow_before_a_large_weight(norm: float) -> None:
    weights = [torch.full((1, 1), value, dtype=torch.float64) for value in (1e300, 1e-200, 1e-150)]
    one = torch.ones(1, dtype=torch.float64)
    found = chain_interval_jacobian(
        [weights], [None, one, one, None], [None, one, one, None], norm=norm
    )
    assert Fraction(float(found)) >= Fraction(1e300) * Fraction(1e-200) * Fraction(1e-150)


@pytest.mark.parametrize("norm", NORMS)
def test_roundings_of_denormal_rows_before_large_weights(
    norm: float, generator: torch.Generator, capability: str
) -> None:
    for _ in range(200):
        weights = chain((1, 5, 1), generator)
        weights[0] *= 1e300
        weights[1] *= 1e-307
        found = chain_interval_jacobian([weights], [None] * 3, [None] * 3, norm=norm)
        assert Fraction(float(found)) >= largest(times(exact(weights[1]), exact(weights[0])), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [(0.0, 1.0), (0.0, 0.0), (-1.0, 2.0)])
def test_where_numbers_overflow_the_answer_is_inf(norm: float, box: tuple[float, float]) -> None:
    low, high = (torch.full((2,), end, dtype=torch.float64) for end in box)
    huge = torch.full((2, 2), 1e200, dtype=torch.float64)
    networks = [[huge, huge, huge], [huge / 1e200] * 3]
    ends = [None, low, low, None], [None, high, high, None]
    found = chain_interval_jacobian(networks, *ends, norm=norm).tolist()
    assert found[0] == math.inf or box == (0.0, 0.0)
    assert found[1] < 100.0
    broken = [torch.full((2, 2), math.nan, dtype=torch.float64), huge / 1e200, huge / 1e200]
    assert chain_interval_jacobian([broken], *ends, norm=norm).item() == math.inf


def test_outputs_in_blocks(generator: torch.Generator) -> None:
    widths = (3, 5, 41)
    weights = chain(widths, generator)
    lower, upper = slopes(widths, generator)
    for norm in NORMS:
        found = float(chain_interval_jacobian([weights], lower, upper, norm=norm))
        assert found == pytest.approx(reference(weights, lower, upper, norm), rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_sums_of_the_weights(norm: float, generator: torch.Generator, capability: str) -> None:
    widths = (3, 50, 7, 67)
    for dtype in (torch.float32, torch.float64):
        networks = [chain(widths, generator, dtype) for _ in range(3)]
        none = [None] * len(widths)
        found = op(networks, none, none, norm=norm).sums
        truth = [
            [float(torch.linalg.matrix_norm(w.double(), norm)) for w in own] for own in networks
        ]
        torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float64))
    networks[1][1][2, 3] = math.nan
    assert op(networks, none, none, norm=norm).sums.isnan().nonzero().tolist() == [[1, 1]]


def test_opcheck(generator: torch.Generator) -> None:
    weights = [*chain((3, 4, 2), generator), *chain((3, 4, 2), generator)]
    none, zero = torch.empty(0, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    ends = [none, zero, none], [none, zero + 1, none]
    for errors in ([], [none, weights[1].abs(), none, none]):
        for norm in (0, 1):
            torch.library.opcheck(
                torch.ops.lipfast.chain_interval_jacobian.default, (weights, errors, *ends, norm)
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 2}, "norm must be 1 or inf"),
        ({"weights": []}, "at least one network"),
        (
            {"weights": [[torch.ones(2, 2)], [torch.ones(2, 2), torch.ones(2, 2)]]},
            "expected 1 maps",
        ),
        ({"weights": [[torch.ones(2)]]}, "network 0, map 0: expected 2 dimensions"),
        ({"weights": [[torch.ones(2, 2, dtype=torch.int64)]]}, "network 0, map 0"),
        ({"weights": [[torch.ones(2, 2)], [torch.ones(2, 3)]]}, "expected 2 x 2, got 2 x 3"),
        ({"weights": [[torch.ones(0, 2)]]}, "sides must be between"),
        ({"lower": [None, None], "upper": [None, torch.ones(2)]}, "one end only"),
        ({"lower": [None, torch.ones(3)], "upper": [None, torch.ones(3)]}, "got 1 x 3"),
        ({"lower": [None], "upper": [None]}, "ranges of slopes"),
        ({"errors": [[torch.ones(3, 2)]]}, "error 0: expected 2 x 2"),
        ({"errors": [[torch.ones(2, 2), torch.ones(2, 2)]]}, "errors of 2 of 1"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "weights": [[torch.ones(2, 2)]],
        "lower": [None, None],
        "upper": [None, None],
        "norm": 1,
    }
    with pytest.raises(ArgumentError, match=message):
        chain_interval_jacobian(**{**arguments, **change})  # type: ignore[arg-type]
