"""Quadratic constraints of chains: values, searches, arguments.

What is proved is tested in test_chain_quadratic_never_below.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.upper.quadratic.boxes import boxes_of
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from lipfast.reference.chain_quadratic import chain_quadratic as reference

BOXES = {"relu": (0.0, 1.0), "gelu": (-0.1289, 1.1289), "abs": (-1.0, 1.0), "steep": (0.5, 2.0)}
SIZES = [(3, 4, 2), (5, 50, 50, 50, 5), (1, 1, 1), (40, 70, 33, 10), (7, 90, 80), (3, 130, 2, 66)]


def random_chain(
    sizes: Sequence[int], seed: int = 0, decades: float = 0.0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows, columns in zip(sizes[1:], sizes[:-1], strict=True):
        scale = 10.0 ** (decades * torch.randn(rows, 1, generator=generator, dtype=torch.float64))
        weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        found.append((scale * weight / columns**0.5).to(dtype))
    return found


def slopes_between(
    sizes: Sequence[int], box: tuple[float, float]
) -> tuple[list[Tensor], list[Tensor]]:
    ends = [torch.tensor(end, dtype=torch.float64) for end in box]
    boxes = [boxes_of(*(end.expand(size) for end in ends)) for size in sizes[1:-1]]
    return [own.means for own in boxes], [own.products for own in boxes]


def bound(sizes: Sequence[int], weights: list[Tensor], box: str, **options: Any) -> ChainQuadratic:
    return chain_quadratic([weights], *slopes_between(sizes, BOXES[box]), **options)


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_as_tight_as_the_reference(capability: str, sizes: tuple[int, ...], box: str) -> None:
    weights = random_chain(sizes)
    found = bound(sizes, weights, box, evaluations=60)
    truth = reference(weights, *slopes_between(sizes, BOXES[box]), evaluations=60)
    product = math.prod(float(torch.linalg.matrix_norm(weight, 2)) for weight in weights)
    product *= max(map(abs, BOXES[box])) ** (len(sizes) - 2)
    assert found.log_values.item() < truth.log_value + 0.02
    # Where m = 0 nothing is gained, and what is best for two layers may be worse for the first.
    assert box == "abs" or found.values.item() <= product * 1.0001
    torch.testing.assert_close(found.log_values.exp(), found.values, rtol=1e-12, atol=0)


def test_one_unit_is_exact(capability: str) -> None:
    one = chain_quadratic(
        [[torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]])]], *slopes_between((2, 1, 1), (0, 1))
    )
    assert 10 <= one.values.item() <= 10 * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rescaling_of_units_changes_nothing(capability: str, dtype: torch.dtype) -> None:
    """Powers of two are taken out first, up to ties."""
    sizes = (6, 20, 15, 4)
    weights = random_chain(sizes, dtype=dtype)
    powers = [torch.arange(n) * 7 % 19 - 9 for n in sizes[1:-1]]
    scales = [torch.ones(sizes[0]), *(2.0**power for power in powers), torch.ones(sizes[-1])]
    moved = [
        (weight.double() * after[:, None] / before).to(dtype)
        for weight, before, after in zip(weights, scales[:-1], scales[1:], strict=True)
    ]
    found, other = bound(sizes, weights, "relu"), bound(sizes, moved, "relu")
    assert other.values.item() == pytest.approx(found.values.item(), rel=0.02)


def test_more_evaluations_are_never_worse() -> None:
    sizes = (10, 40, 40, 5)
    weights = random_chain(sizes)
    values = [bound(sizes, weights, "relu", evaluations=e).values.item() for e in (0, 5, 30, 100)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(values))
    assert values[-1] < 0.9 * values[0]


def test_starts_from_an_earlier_result(capability: str) -> None:
    sizes = (10, 60, 40, 5)
    weights = random_chain(sizes)
    before = bound(sizes, weights, "gelu", evaluations=100)
    moved = [w + 0.003 * step for w, step in zip(weights, random_chain(sizes, 1), strict=True)]
    cold = bound(sizes, moved, "gelu", evaluations=0)
    warm = bound(sizes, moved, "gelu", evaluations=1, start=[logs[0] for logs in before.logs])
    best = bound(sizes, moved, "gelu", evaluations=100)
    assert warm.values.item() < cold.values.item()
    assert warm.values.item() < 1.03 * best.values.item()


def test_one_evaluation_along_a_run_is_as_good_as_ten(capability: str) -> None:
    """The best multipliers of a network are useless for the next one as they are."""
    sizes = (10, 60, 60, 5)
    weights, start = random_chain(sizes, dtype=torch.float32), None
    lost = []
    for step in range(12):
        moves = random_chain(sizes, 1 + step, dtype=torch.float32)
        weights = [w + 0.02 * move for w, move in zip(weights, moves, strict=True)]
        cold = bound(sizes, weights, "relu", evaluations=10)
        warm = bound(sizes, weights, "relu", evaluations=1 if start else 10, start=start)
        start = [logs[0] for logs in warm.logs]
        lost.append((warm.log_values - cold.log_values).item())
    assert sum(lost) / len(lost) < 0.02
    assert max(lost) < 0.1


@pytest.mark.parametrize("seed", range(4))
def test_multipliers_of_other_weights(capability: str, seed: int) -> None:
    """After a jump a single evaluation is not taken at its word."""
    sizes = (10, 60, 60, 5)
    weights, other = (random_chain(sizes, own, dtype=torch.float32) for own in (seed, 50 + seed))
    before = bound(sizes, other, "relu", evaluations=30)
    start = [logs[0] for logs in before.logs]
    cold, warm = (
        bound(sizes, weights, "relu", evaluations=count, start=own)
        for count, own in ((10, None), (1, start))
    )
    assert (warm.log_values - cold.log_values).item() < 0.1
    scaled = [1e12 * weights[0], *weights[1:]]
    warm = bound(sizes, scaled, "relu", evaluations=1, start=start)
    assert (warm.log_values - cold.log_values).item() < math.log(1e12) + 0.1


@pytest.mark.parametrize("box", BOXES)
def test_one_evaluation_is_no_worse_than_none(capability: str, box: str) -> None:
    """The step is proved at once, or else where it began."""
    sizes = (7, 30, 20, 4)
    gains = []
    for seed in range(12):
        weights = random_chain(sizes, seed, decades=seed % 3)
        none, one = (bound(sizes, weights, box, evaluations=count) for count in (0, 1))
        gains.append((none.log_values - one.log_values).item())
    assert min(gains) > -1e-6
    assert box == "abs" or max(gains) > 0.01  # where m = 0 a start has no room for a step


@pytest.mark.parametrize("shift", [3, 499, 501, 900])
def test_exponents_of_any_size(capability: str, shift: int) -> None:
    """Entries are scaled by products of two powers where those are numbers, or one by one."""
    sizes = (19, 35, 18)
    weights = random_chain(sizes)
    moved = [weights[0] * 2.0**shift, weights[1] * 2.0**-shift]
    own, found = bound(sizes, weights, "gelu"), bound(sizes, moved, "gelu")
    assert torch.equal(own.squares, found.squares)
    assert torch.equal(own.values, found.values)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e4, -1e4])
def test_starts_that_say_nothing(capability: str, number: float) -> None:
    sizes = (10, 60, 40, 5)
    weights = random_chain(sizes)
    start = [torch.zeros(n, dtype=torch.float64) for n in sizes[1:-1]]
    start[1][3] = number
    found = bound(sizes, weights, "relu", start=start)
    assert found.values.item() == bound(sizes, weights, "relu").values.item()


def test_many_networks_are_bounded_as_one(capability: str) -> None:
    sizes = (6, 33, 17, 3)
    networks = [random_chain(sizes, seed) for seed in range(7)]
    constraints = slopes_between(sizes, (0, 1))
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(chain_quadratic(networks, *constraints))
    torch.set_num_threads(threads)
    alone = [chain_quadratic([weights], *constraints) for weights in networks]
    for field in ("values", "log_values", "squares", "weight_exponents", "evaluations"):
        own = [getattr(result, field) for result in found]
        assert torch.equal(*own)
        assert torch.equal(own[0], torch.cat([getattr(result, field) for result in alone]))
    for layer in range(2):
        one = [result.multipliers[layer] for result in alone]
        assert torch.equal(found[0].multipliers[layer], torch.cat(one))


def test_a_large_network_on_all_threads() -> None:
    sizes = (100, 800, 700, 10)
    weights = random_chain(sizes, dtype=torch.float32)
    threads = torch.get_num_threads()
    values = []
    for count in (1, 2):
        torch.set_num_threads(count)
        values.append(bound(sizes, weights, "relu", evaluations=3))
    torch.set_num_threads(threads)
    assert torch.equal(values[0].values, values[1].values)
    assert torch.equal(values[0].multipliers[0], values[1].multipliers[0])


def test_threads_that_flush_denormals(capability: str) -> None:
    """The proof assumes IEEE arithmetic: the mode of the caller changes no bit."""
    sizes = (6, 33, 17, 3)
    weights = random_chain(sizes, decades=3)
    found = bound(sizes, weights, "gelu")
    supported = torch.set_flush_denormal(True)
    try:
        flushed = bound(sizes, weights, "gelu")
    finally:
        torch.set_flush_denormal(False)
    assert supported
    assert torch.equal(found.values, flushed.values)


def test_deep_chains(capability: str) -> None:
    """A hundred layers at half their norms: no number of the sweep leaves its range."""
    sizes = (5, *[8] * 100, 3)
    weights = [0.5 * weight for weight in random_chain(sizes)]
    found = bound(sizes, weights, "relu", evaluations=5)
    product = sum(math.log(float(torch.linalg.matrix_norm(weight, 2))) for weight in weights)
    assert found.log_values.item() < product - 20


@pytest.mark.parametrize("outputs", [65, 200])
def test_many_outputs(capability: str, outputs: int) -> None:
    sizes = (20, 40, 30, outputs)
    weights = random_chain(sizes)
    found = bound(sizes, weights, "relu", evaluations=60)
    truth = reference(weights, *slopes_between(sizes, (0, 1)), evaluations=60)
    assert abs(found.log_values.item() - truth.log_value) < 0.03


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_prove_nothing(capability: str, number: float) -> None:
    sizes = (3, 4, 2)
    for index in range(2):
        weights = random_chain(sizes)
        weights[index][0, 1] = number
        assert bound(sizes, weights, "relu").values.item() == math.inf
    for index in range(2):
        constraints = slopes_between(sizes, (0, 1))
        constraints[index][0][1] = number
        found = chain_quadratic([random_chain(sizes)], *constraints)
        assert found.log_values.item() == found.values.item() == math.inf


@pytest.mark.parametrize("size", [1e-300, 1e-160, 1e-30, 1e30, 1e150, 1e300])
def test_sizes_that_float64_hardly_holds(capability: str, size: float) -> None:
    """The second weight takes back what the first is scaled by: the constant stays the same."""
    sizes = (3, 4, 2)
    weights = random_chain(sizes)
    found = bound(sizes, [weights[0] * size, weights[1] / size], "relu")
    assert found.values.item() == pytest.approx(
        bound(sizes, weights, "relu").values.item(), rel=1e-3
    )
    alone = bound(sizes, [weights[0] * size, weights[1]], "relu")
    shift = math.log(size)
    assert alone.log_values.item() - shift == pytest.approx(
        bound(sizes, weights, "relu").log_values.item(), abs=1e-3
    )


def test_layers_that_are_zero(capability: str) -> None:
    sizes = (3, 4, 3, 2)
    for index in range(3):
        weights = random_chain(sizes)
        weights[index].zero_()
        assert 0 <= bound(sizes, weights, "gelu").values.item() < 1e-6


def test_arguments_that_are_wrong() -> None:
    sizes = (3, 4, 2)
    weights, (means, products) = random_chain(sizes), slopes_between(sizes, (0, 1))
    cases: list[tuple[str, Sequence[Any], dict[str, Any]]] = [
        ("at least one network", ([], means, products), {}),
        ("at least one network", ([weights[:1]], means, products), {}),
        ("network 1: 1 weights", ([weights, weights[:1]], means, products), {}),
        ("network 0, weight 1: expected", ([[weights[0], weights[0]]], means, products), {}),
        ("network 0, weight 0", ([[weights[0].int(), weights[1]]], means, products), {}),
        ("means: 0 tensors", ([weights], [], products), {}),
        ("products of layer 0", ([weights], means, [products[0][:2]]), {}),
        ("start of layer 0", ([weights], means, products), {"start": [means[0][:1]]}),
        ("evaluations", ([weights], means, products), {"evaluations": -1}),
        ("errors: 1 for 2", ([weights], means, products), {"errors": [[None]]}),
        ("network 0, error 1", ([weights], means, products), {"errors": [[None, weights[0]]]}),
    ]
    for message, arguments, options in cases:
        with pytest.raises(ArgumentError, match=message):
            chain_quadratic(*arguments, **options)


def test_opcheck(capability: str) -> None:
    sizes = (3, 4, 5, 2)
    weights, constraints = random_chain(sizes), slopes_between(sizes, (0, 1))
    errors = [torch.zeros(0, dtype=torch.float64), *(1e-9 * w.abs() for w in weights[1:])]
    for given in ([], errors):
        torch.library.opcheck(
            torch.ops.lipfast.chain_quadratic.default, (weights, given, *constraints, [], 3, 4)
        )
