"""What the residual proves is true in rational arithmetic, and false without its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic import residual_proof
from lipfast.estimators.upper.quadratic.boxes import boxes_of
from lipfast.estimators.upper.quadratic.residual_proof import Block, blocks_of, scaled_blocks

Rows = list[list[Fraction]]
TRIALS = 25
# One matrix after the other, and many at once, as a device is given them.
BOTH = [False, True]
RANGES = [(0.0, 1.0), (-0.13, 1.13), (0.6, 1.0), (-1.0, 1.0)]


class Case:
    """A chain with multipliers near singular, and the smallest rho^2 that passes."""

    def __init__(
        self, seed: int, *, relative: float = 0.0, together: bool = False, without: str = ""
    ) -> None:
        self.without = without
        self.proved = self._together if together else self._alone
        generator = torch.Generator().manual_seed(seed)
        sizes = [2, 3, 2, 1] if seed % 2 else [3, 2, 2]
        pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
        self.weights = [torch.randn(p, generator=generator, dtype=torch.float64) for p in pairs]
        self.errors = [relative * w.abs() if relative else None for w in self.weights]
        ends = torch.tensor(RANGES[seed % 4], dtype=torch.float64)
        self.boxes = [tuple(boxes_of(*ends[:, None].expand(2, n))) for n in sizes[1:-1]]
        self.signs = [
            torch.where(torch.rand(p, generator=generator) < 0.5, -1.0, 1.0).double() for p in pairs
        ]
        self.multipliers: list[Tensor] = []
        inner = self.weights[0] @ self.weights[0].T
        margins = 10.0 ** (-7 * torch.rand(len(sizes), generator=generator, dtype=torch.float64))
        for weight, (m, p), margin in zip(self.weights[1:], self.boxes, margins, strict=False):
            d = torch.ones(len(m), dtype=torch.float64) * torch.linalg.eigvalsh(inner)[-1]
            d = d * (1 + margin)
            self.multipliers.append(d)
            bent = torch.diag(m * d) @ torch.linalg.inv(torch.diag(d) - inner) @ torch.diag(m * d)
            inner = weight @ (bent - torch.diag(p * d)) @ weight.T
        self.square = self._smallest(float(torch.linalg.eigvalsh(inner)[-1]))

    def _given(self, square: float) -> dict[str, list[Tensor]]:
        rows = [len(w) for w in self.weights]
        last = torch.full((rows[-1],), square, dtype=torch.float64)
        return {
            "multipliers": [*self.multipliers, last],
            "exponents": [torch.zeros(n, dtype=torch.int32) for n in rows],
        }

    def _alone(self, square: float) -> bool:
        given, maps = self._given(square), [0] * len(self.weights)
        blocks = scaled_blocks(self.weights, self.errors, self.boxes, maps=maps, **given)
        if isinstance(blocks, str):
            return False
        return residual_proof.why_not_positive(self._left(blocks)) is None

    def _left(self, blocks: Sequence[Block]) -> list[Block]:
        """Without the errors of the first matrix, or of the others, where they are left out."""
        parts = ["first", *["others"] * (len(blocks) - 1)]
        return [
            replace(block, error=None) if part == self.without else block
            for block, part in zip(blocks, parts, strict=True)
        ]

    def _together(self, square: float) -> bool:
        """With the eta that a factorisation or two ask for."""
        given = {name: [t[None] for t in own] for name, own in self._given(square).items()}
        boxes = [(m[None], p[None]) for m, p in self.boxes]
        errors = [None if e is None else e[None] for e in self.errors]
        maps = [torch.zeros(1, 1, dtype=torch.int64)] * len(self.weights)
        weights = [w[None] for w in self.weights]
        made, right = blocks_of(weights, errors, boxes, maps=maps, **given)
        blocks = self._left(made)
        matrix = [residual_proof.matrix_blocks(block) for block in blocks]
        w = [own.diagonal(dim1=1, dim2=2).sqrt() for own, _ in matrix]
        eta = [torch.zeros_like(block.own) for block in blocks]
        for _ in range(3):
            factor = [
                (r, side) for r, side, _ in residual_proof._block_factors(blocks, matrix, eta)
            ]
            needed = residual_proof._needed(blocks, matrix, eta, factor, w)
            eta = [torch.maximum(e, 1.1 * n / o) for e, n, o in zip(eta, needed, w, strict=True)]
        return bool(residual_proof.proved_together(blocks, right, eta))

    def _smallest(self, about: float) -> float | None:
        low, high = about * (1 - 1e-3), about * (1 + 1e-2)
        if not self.proved(high):
            return None
        for _ in range(48):
            middle = (low + high) / 2
            low, high = (low, middle) if self.proved(middle) else (middle, high)
        return high

    def true(self) -> bool:
        """Whether the matrix of weights at the far ends of their errors is positive, exactly."""
        assert self.square is not None
        signs = ([s * k for s in self.signs] for k in (-1, 0, 1))
        aligned = ([w.sign() * k for w in self.weights] for k in (-1, 1))
        return all(self._true_at(own) for own in (*signs, *aligned))

    def _true_at(self, signs: Sequence[Tensor]) -> bool:
        weights = [
            exact(w) if e is None else added(exact(w), exact(e * s))
            for w, e, s in zip(self.weights, self.errors, signs, strict=True)
        ]
        own = [*(d.tolist() for d in self.multipliers), [self.square] * len(weights[-1])]
        starts = [sum(len(d) for d in own[:b]) for b in range(len(own) + 1)]
        matrix = [[Fraction(0)] * starts[-1] for _ in range(starts[-1])]
        for b, (weight, start) in enumerate(zip(weights, starts, strict=False)):
            m, p = (t.tolist() for t in self.boxes[b - 1]) if b else ([], [])
            scale = [Fraction(p[k]) * Fraction(own[b - 1][k]) for k in range(len(p))]
            scale = scale or [Fraction(-1)] * len(weight[0])
            for j, row in enumerate(weight):
                matrix[start + j][start + j] += Fraction(own[b][j])
                for i, other in enumerate(weight):
                    terms = (x * y * c for x, y, c in zip(row, other, scale, strict=True))
                    matrix[start + j][start + i] += sum(terms)
                for k in range(len(p)):
                    entry = row[k] * Fraction(m[k]) * Fraction(own[b - 1][k])
                    matrix[start + j][starts[b - 1] + k] = entry
                    matrix[starts[b - 1] + k][start + j] = entry
        return positive(matrix)


def exact(matrix: Tensor) -> Rows:
    return [[Fraction(x) for x in row] for row in matrix.tolist()]


def added(left: Rows, right: Rows) -> Rows:
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(left, right, strict=True)]


def positive(matrix: Rows) -> bool:
    """Positive semidefinite, by elimination."""
    rest = [row[:] for row in matrix]
    while rest:
        (pivot, *first), below = rest[0], rest[1:]
        if pivot < 0 or (pivot == 0 and any(first)):
            return False
        rest = [
            [x - (row[0] * y / pivot if pivot else 0) for x, y in zip(row[1:], first, strict=True)]
            for row in below
        ]
    return True


def cases(together: bool, relative: float = 0.0, without: str = "") -> list[Case]:
    options = {"relative": relative, "together": together, "without": without}
    found = [Case(seed, **options) for seed in range(TRIALS)]  # type: ignore[arg-type]
    return [case for case in found if case.square is not None]


@pytest.mark.parametrize("together", BOTH)
@pytest.mark.parametrize("relative", [0.0, 1e-9])
def test_the_smallest_that_passes_is_true(relative: float, together: bool) -> None:
    found = cases(together, relative)
    assert len(found) > TRIALS / 2
    assert all(case.true() for case in found)


@pytest.mark.parametrize("together", BOTH)
def test_false_without_the_roundings(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual_proof, "gamma", lambda _: 0.0)
    assert not all(case.true() for case in cases(together))


@pytest.mark.parametrize("together", BOTH)
@pytest.mark.parametrize("part", ["first", "others"])
def test_false_without_errors_of_weights(part: str, together: bool) -> None:
    assert not all(case.true() for case in cases(together, 1e-9, part))


@pytest.mark.parametrize("together", BOTH)
@pytest.mark.parametrize("term", ["_error_on_diagonal", "_error_left"])
def test_false_without_a_term_of_errors(
    term: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(block: Block, *_: Tensor) -> Tensor | tuple[float, float]:
        return torch.zeros_like(block.own) if term == "_error_on_diagonal" else (0.0, 0.0)

    monkeypatch.setattr(residual_proof, term, nothing)
    assert not all(case.true() for case in cases(together, 1e-9))


def test_roundings_to_the_left_of_the_diagonal_are_within_their_term() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, side = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in "ws")
    before = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    mean, d = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    left = weight * (mean * d)
    computed = exact(left - side @ before.T)
    ones = torch.ones(3, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    term, _ = residual_proof._roundings_left(left.abs(), side.abs(), before.abs(), *ones)
    exactly = [exact(t[None])[0] for t in (mean, d)]
    for j, row in enumerate(exact(weight)):
        off = Fraction(0)
        for k in range(5):
            sums = zip(exact(side)[j], exact(before)[k], strict=True)
            true = row[k] * exactly[0][k] * exactly[1][k] - sum(x * y for x, y in sums)
            off += abs(computed[j][k] - true)
        assert 0 < off <= Fraction(float(term[j]))
