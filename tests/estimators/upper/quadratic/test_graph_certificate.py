"""Proofs of single steps, re-checked in exact arithmetic with the true matrices."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic import graph_certificate
from lipfast.estimators.upper.quadratic.graph_certificate import _Step, proved_square
from lipfast.estimators.upper.quadratic.graph_constraints import of_slopes, of_vectors
from lipfast.estimators.upper.quadratic.graph_linear import Coefficients
from lipfast.estimators.upper.quadratic.graph_problem import GraphStep, Problem

# Multipliers that are large enough for `_problem`.
_ENOUGH = 200.0, 20000.0
_LIKE = torch.zeros((), dtype=torch.float64)
_Matrix = list[list[Fraction]]


def _exact(matrix: Tensor) -> _Matrix:
    return [[Fraction(value) for value in row] for row in matrix.tolist()]


def _times(a: _Matrix, b: _Matrix) -> _Matrix:
    columns = list(zip(*b, strict=True))
    return [
        [sum((x * y for x, y in zip(row, c, strict=True)), Fraction(0)) for c in columns]
        for row in a
    ]


def _turned(a: _Matrix) -> _Matrix:
    return [list(row) for row in zip(*a, strict=True)]


def _is_positive(matrix: _Matrix) -> bool:
    """Whether a symmetric matrix is positive semidefinite, by elimination."""
    rest = [list(row) for row in matrix]
    while rest:
        pivot, row = rest[0][0], rest[0][1:]
        if pivot < 0 or (pivot == 0 and any(row)):
            return False
        below = [r[1:] for r in rest[1:]]
        if pivot:
            below = [
                [v - x * y / pivot for v, y in zip(r, row, strict=True)]
                for r, x in zip(below, row, strict=True)
            ]
        rest = below
    return True


def _inequality(
    step: GraphStep, true: tuple[Tensor, Tensor, Tensor], y: Tensor, behind: Tensor, d: Tensor
) -> _Matrix:
    """The matrix of a step, with its true matrices C, A and B."""
    c, a, b = map(_exact, true)
    before, after, n = _exact(y), _exact(behind), step.constraint.inputs
    read = _times(_times(c, before), _turned(c))
    mixed = _times(_times(c, before), _turned(a))
    kept = _times(_times(a, before), _turned(a))
    means, products = step.constraint.means, step.constraint.products
    own = [Fraction(x) for x in d.expand(n).tolist()]
    out = [Fraction(x) for x in products.expand(step.constraint.outputs).tolist()]
    weights = d.expand(step.constraint.outputs).tolist()
    out = [x * Fraction(w) for x, w in zip(out, weights, strict=True)]
    half = [[Fraction(0)] * len(after) for _ in range(n)]
    if means is not None:
        m = [Fraction(x) * w for x, w in zip(means.tolist(), own, strict=True)]
        half = [[m[j] * b[i][j] for i in range(len(after))] for j in range(n)]
    added = _times([[x * w for x, w in zip(row, out, strict=True)] for row in b], _turned(b))
    first = [[(own[j] if j == k else 0) - read[j][k] for k in range(n)] for j in range(n)]
    across = [[-mixed[j][i] - half[j][i] for i in range(len(after))] for j in range(n)]
    last = [
        [after[i][k] - kept[i][k] + added[i][k] for k in range(len(after))]
        for i in range(len(after))
    ]
    top = [left + right for left, right in zip(first, across, strict=True)]
    return top + [list(c) + r for c, r in zip(zip(*across, strict=True), last, strict=True)]


def _case(
    seed: int, vectors: bool, errors: str
) -> tuple[GraphStep, tuple[Tensor, ...], Tensor, Tensor]:
    """A step with errors in some of its matrices, its true matrices, Y, and nearly singular D."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, before, after = 3, 4, 3
    stored = {"C": random(n, before), "A": random(after, before), "B": random(after, n)}
    given, true = {}, {}
    for name, value in stored.items():
        off = 1e-6 * random(*value.shape) * (name in errors)
        true[name] = value + off
        bound = (true[name] - value).abs() * (1 + 1e-9) + 2.0**-100
        given[name] = Coefficients(value, bound if name in errors else None)
    root = random(before, before)
    y = root @ root.T
    y = (y + y.T) / 2
    lower = -torch.rand(n, generator=generator, dtype=torch.float64)
    constraint = of_vectors(1.25, n, n, _LIKE) if vectors else of_slopes(lower, lower + 1.3)
    step = GraphStep("step", constraint, given["C"], given["A"], given["B"], (before,), (after,))
    k = stored["C"] @ y @ stored["C"].T
    top = torch.linalg.eigvalsh(k)[-1] * (
        1.0 + 10.0 ** -(2.0 + 12.0 * torch.rand((), generator=generator, dtype=torch.float64))
    )
    return step, tuple(true.values()), y, top.expand(constraint.multipliers).clone()


def _false_proofs(
    count: int, errors: str, *, taken: bool, vectors: bool = False
) -> tuple[int, int]:
    """How many steps were proved, and how many of these wrongly."""
    proved = wrong = 0
    for seed in range(count):
        step, true, y, d = _case(seed, vectors, errors)
        if not taken:
            plain = [Coefficients(own.value) for own in (step.read, step.kept, step.added)]
            step = replace(step, read=plain[0], kept=plain[1], added=plain[2])
        found = _Step(step, y, _LIKE).proved(d)
        if found is not None:
            proved += 1
            wrong += not _is_positive(_inequality(step, true, y, *found))
    return proved, wrong


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("errors", ["", "C", "A", "B", "CAB"])
def test_what_is_proved_holds_for_the_true_matrices(errors: str, vectors: bool) -> None:
    proved, wrong = _false_proofs(12, errors, taken=True, vectors=vectors)
    assert proved >= 6
    assert wrong == 0


@pytest.mark.parametrize("errors", ["C", "A", "B"])
def test_errors_of_each_matrix_are_needed(errors: str) -> None:
    assert _false_proofs(12, errors, taken=False)[1] > 0


def _one_unit(seed: int) -> tuple[GraphStep, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """One unit with D a few units in the last place from K, as it is computed."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(1, 40, generator=generator, dtype=torch.float64)
    b = torch.ones(1, 1, dtype=torch.float64)
    y = torch.eye(40, dtype=torch.float64)
    constraint = of_slopes(torch.zeros(1).double(), torch.ones(1).double())
    step = GraphStep("s", constraint, Coefficients(c), None, Coefficients(b), (40,), (1,))
    k = (c @ y @ c.T).reshape(1)
    d = k * (1.0 + 2.0**-52 * (1 + seed % 4))
    return step, (c, torch.zeros(1, 40).double(), b), y, d


def _false_proofs_of_one_unit() -> tuple[int, int]:
    proved = wrong = 0
    for seed in range(40):
        step, true, y, d = _one_unit(seed)
        found = _Step(step, y, _LIKE).proved(d)
        if found is not None:
            proved += 1
            wrong += not _is_positive(_inequality(step, true, y, *found))
    return proved, wrong


def test_rounding_is_accounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    proved, wrong = _false_proofs_of_one_unit()
    assert proved == 40
    assert wrong == 0
    monkeypatch.setattr(graph_certificate, "gamma", lambda count: 0.0)
    monkeypatch.setattr(graph_certificate, "_UNDERFLOWS", 0.0)
    assert _false_proofs_of_one_unit()[1] > 0


def _problem() -> Problem:
    """Two ReLUs one behind the other."""
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    constraint = of_slopes(torch.zeros(3).double(), torch.ones(3).double())
    first, second, last = (Coefficients(matrix) for matrix in matrices)
    plain = Coefficients()
    steps = tuple(
        GraphStep(str(index), constraint, read, None, plain, (3,), (3,))
        for index, read in enumerate((first, second))
    )
    return Problem((3,), steps, last, (3,), _LIKE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-300, 1e300])
@pytest.mark.parametrize("at", [0, 1])
def test_no_multiplier_out_of_range_proves_anything(value: float, at: int) -> None:
    multipliers = [torch.full((3,), enough).double() for enough in _ENOUGH]
    assert proved_square(_problem(), multipliers, [0, 0]).square < math.inf
    multipliers[at][1] = value
    found = proved_square(_problem(), multipliers, [0, 0])
    assert found.square == math.inf
    assert found.reason is not None


def test_multipliers_of_other_shapes_and_far_shifts_are_refused() -> None:
    right = torch.full((3,), 20000.0).double()
    for multipliers, shifts in (([right, right[:2]], [0, 0]), ([right, right], [0, 1000])):
        assert proved_square(_problem(), multipliers, shifts).square == math.inf


def test_too_small_multipliers_prove_nothing() -> None:
    small = [torch.full((3,), value).double() for value in (200.0, 1e-3)]
    found = proved_square(_problem(), small, [0, 0])
    assert found.square == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("part", ["value", "error"])
def test_matrices_that_are_not_numbers_prove_nothing(value: float, part: str) -> None:
    problem = _problem()
    step = problem.steps[1]
    tensor = torch.ones(3, 3).double()
    tensor[1, 2] = value
    read = replace(Coefficients(torch.ones(3, 3).double()), **{part: tensor})
    wrong = replace(problem, steps=(problem.steps[0], replace(step, read=read)))
    multipliers = [torch.full((3,), enough).double() for enough in _ENOUGH]
    assert proved_square(problem, multipliers, [0, 0]).square < math.inf
    assert proved_square(wrong, multipliers, [0, 0]).square == math.inf


def test_shifts_change_nothing_but_the_scale() -> None:
    multipliers = [torch.full((3,), value).double() for value in _ENOUGH]
    plain = proved_square(_problem(), multipliers, [0, 0])
    shifted = proved_square(_problem(), [multipliers[0], multipliers[1] / 16], [2, 0])
    assert shifted.scale == 2
    assert shifted.square * 16 == pytest.approx(plain.square, rel=1e-9)
