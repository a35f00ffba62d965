r"""Proof of a bound by quadratic constraints of a graph: one inequality per step.

With Y and Y' the stored matrices before and behind a step, $v = C b$ what it reads and
$b' = A b + B a$ what is carried on, adjoint signals g' behind the step give
$g = A^T g' + C^T s$ and $q = B^T g'$, and

$g'^T Y' g' - g^T Y g + \sum_j D_j (s_j^2 - 2 m_j s_j q_j + p_j q_j^2) \ge 0$ for all g' and s

says that $g^T Y g \le g'^T Y' g'$ for each s that slopes of the constraint make of q. From
$\rho^2 \|t\|^2$ at the outputs to $\|g_0\|^2$ at the inputs this is $\|J^T t\| \le \rho \|t\|$.
Each matrix H of such a form is proved to be positive semidefinite by some F, whatever made it:
$H = F F^T + R$, and R, computed, is diagonally dominant with all that rounding may have done to it
and to H. See docs/bounds.md, "Quadratic constraints of a graph".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_blocks import (
    Products,
    Terms,
    added_products,
    coupling,
    output_products,
    products_of,
    terms_of,
)
from lipfast.estimators.upper.quadratic.graph_linear import Coefficients
from lipfast.estimators.upper.quadratic.graph_problem import GraphStep, Problem
from lipfast.ops.emulation import products_are_ieee
from lipfast.rounding import gamma, widened

_PROOF_ATTEMPTS = 8
# What multipliers are raised by where they are too small for Y, which grows by the slack before.
_RAISE = 1e-10
# Beside the room that rounding needs: the least of a diagonal, relative to its largest.
_LEAST_DIAGONAL = 2.0**-100
# What is refused: entries beyond, multipliers and scales outside, more rows.
_LARGEST = 2.0**100
_SCALE_RANGE = 2.0**-150, 2.0**150
_LARGEST_SIZE = 1 << 20
# More than what underflows add to a scaled row sum, for numbers in these ranges.
_UNDERFLOWS = 2.0**-240
# Entries of Y that far below its largest are put to zero, so that powers of two scale it exactly.
_VANISHING = 2.0**-300
_LARGEST_SHIFT = 256
# Above the largest eigenvalue of the outputs' Y.
_EXCESS = 1e-12


class GraphProof(NamedTuple):
    """What was proved.

    Attributes:
        square: of the bound, divided by ``4^scale``; infinite where nothing was proved.
        scale: see `square`.
        multipliers: those that the proof was made with, in the scales of their steps.
        reason: why nothing was proved.
    """

    square: float
    scale: int
    multipliers: list[Tensor]
    reason: str | None = None


def proved_square(problem: Problem, multipliers: list[Tensor], shifts: list[int]) -> GraphProof:
    """The square of a bound of the network's Lipschitz constant.

    Args:
        problem: the network's steps.
        multipliers: of each step; any numbers: where they do not prove anything, they are raised a
            little or the bound is infinite.
        shifts: behind each step Y, and all multipliers of later steps, are divided by ``4^shift``.
    """
    if problem.output is None:
        return GraphProof(0.0, 0, [])
    if not products_are_ieee(problem.like.device):
        return _nothing("this device computes products of float64 with shorter numbers")
    y: Tensor | None = None
    used = []
    for step, given, shift in zip(problem.steps, multipliers, shifts, strict=True):
        if not _fits(step, given, shift):
            return _nothing(f"{step.name} has numbers outside of the range of the proof")
        found = _Step(step, y, problem.like).proved(given)
        if found is None:
            return _nothing(f"the inequality of {step.name} could not be proved")
        y = found[0] * 4.0**-shift
        used.append(found[1])
    square = _proved_output(problem, y)
    if square is None:
        return _nothing("the outputs could not be bounded")
    return GraphProof(square, sum(shifts), used)


def _nothing(reason: str) -> GraphProof:
    return GraphProof(math.inf, 0, [], reason)


def _fits(step: GraphStep, multipliers: Tensor, shift: int) -> bool:
    """Whether a step's own numbers are in the range that the proof is for."""
    constraint = step.constraint
    if multipliers.shape != (constraint.multipliers,) or abs(shift) > _LARGEST_SHIFT:
        return False
    low, high = (scale**2 for scale in _SCALE_RANGE)
    inside = bool(((multipliers >= low) & (multipliers <= high)).all())
    rows = sum(step.before) + sum(step.behind) + constraint.inputs + constraint.outputs
    matrices = [step.read, step.added, *([] if step.kept is None else [step.kept])]
    tensors = [t for own in matrices for t in (own.value, own.error) if t is not None]
    tensors += [constraint.products, *([] if constraint.means is None else [constraint.means])]
    return inside and rows <= _LARGEST_SIZE and all(_in_range(tensor) for tensor in tensors)


def _in_range(tensor: Tensor) -> bool:
    """NaN is not."""
    return bool((tensor.abs() <= _LARGEST).all())


class _Magnitudes:
    """``|M| w``, ``|M|^T w``, ``E w`` and ``E^T w`` of a matrix; of None, zeros of these sizes."""

    def __init__(self, matrix: Coefficients | None, rows: int, columns: int) -> None:
        self._matrix, self._rows, self._columns = matrix, rows, columns
        value = None if matrix is None else matrix.value
        self._size = None if value is None else value.abs()
        self._error = None if matrix is None else matrix.error

    def times(self, w: Tensor) -> Tensor:
        if self._matrix is None:
            return w.new_zeros(self._rows)
        return w if self._size is None else self._size @ w

    def back(self, w: Tensor) -> Tensor:
        if self._matrix is None:
            return w.new_zeros(self._columns)
        return w if self._size is None else self._size.mT @ w

    def spread(self, w: Tensor) -> Tensor:
        return w.new_zeros(self._rows) if self._error is None else self._error @ w

    def spread_back(self, w: Tensor) -> Tensor:
        return w.new_zeros(self._columns) if self._error is None else self._error.mT @ w


class _Blocks(NamedTuple):
    """H of a step without Y' and D, computed; and the latter's multipliers."""

    terms: Terms
    read: Tensor
    coupled: Tensor
    behind: Tensor


class _Factor(NamedTuple):
    """F = [L; -X^T], for some L and X."""

    left: Tensor
    solved: Tensor

    def magnitudes(self, own: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
        """``|F| |F|^T w``, in two parts."""
        left, solved = self.left.abs(), self.solved.abs()
        inner = left.mT @ own + solved @ behind
        return left @ inner, solved.mT @ inner


class _Step:
    """The inequality of one step."""

    def __init__(self, step: GraphStep, y: Tensor | None, like: Tensor) -> None:
        self._step, self._y = step, y
        self._size = None if y is None else y.abs()
        self._products: Products = products_of(step, y, like)
        n, before, behind = step.constraint.inputs, sum(step.before), sum(step.behind)
        self._c = _Magnitudes(step.read, n, before)
        self._a = _Magnitudes(step.kept, behind, before)
        self._b = _Magnitudes(step.added, behind, step.constraint.outputs)
        # Terms in a sum of an entry of H - F F^T, on any way through it, and some to spare.
        self._terms = 2 * before + step.constraint.outputs + n + 16
        self._rows = n + behind

    def proved(self, multipliers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Y' and multipliers that the inequality holds for; None where none were found."""
        if self._y is not None and not _in_range(self._y):
            return None
        raised, slack = 0.0, 2.0
        for _ in range(_PROOF_ATTEMPTS):
            own = multipliers * (1.0 + raised)
            blocks = self._blocks(own)
            diagonal = blocks.terms.diagonal
            factor, share = self._factor(blocks, diagonal), 0.0
            if factor is not None:
                lowered, behind = self._rooms(blocks, factor, slack)
                share = float((lowered / diagonal).max())
                factor = None  # its memory
                factor = self._factor(blocks, diagonal - lowered)
            if factor is None:  # D - K is nearly singular: the network needs no better D
                raised = max(_RAISE, 16.0 * raised, 2.0 * share)
                continue
            y = self._with_factor(blocks, factor, behind)
            if y is not None:
                return y, own
            slack *= 4.0
        return None

    def _blocks(self, multipliers: Tensor) -> _Blocks:
        terms = terms_of(self._step.constraint, multipliers)
        behind = -added_products(self._step, terms.product)
        if self._products.kept is not None:
            behind = behind + self._products.kept
        coupled = coupling(self._step, terms, self._products)
        return _Blocks(terms, self._products.read, coupled, (behind + behind.mT) / 2)

    def _factor(self, blocks: _Blocks, diagonal: Tensor) -> _Factor | None:
        left, info = torch.linalg.cholesky_ex(torch.diag(diagonal) - blocks.read)
        if bool(info) or not bool(left.isfinite().all()):
            return None
        solved = torch.linalg.solve_triangular(left, blocks.coupled, upper=False)
        return _Factor(left, solved)

    def _rooms(self, blocks: _Blocks, factor: _Factor, slack: float) -> tuple[Tensor, Tensor]:
        """By how much D is lowered for the factor, and the diagonal of Y' raised: a guess."""
        diagonal = (blocks.behind.diagonal() + factor.solved.square().sum(0)).clamp_min(0.0)
        least = _LEAST_DIAGONAL * diagonal.max().clamp_min(_LEAST_DIAGONAL)
        behind = (diagonal + least).rsqrt()
        own = blocks.terms.diagonal.rsqrt()
        errors = self._errors(blocks.terms, factor, torch.diag(diagonal), own, behind)
        return slack * errors[0] / own, slack * errors[1] / behind + least

    def _with_factor(self, blocks: _Blocks, factor: _Factor, raised: Tensor) -> Tensor | None:
        """Y' with a raised diagonal, where F proves its inequality."""
        diagonal = blocks.terms.diagonal
        y = factor.solved.mT @ factor.solved + blocks.behind
        y = (y + y.mT) / 2 + torch.diag(raised)
        y = torch.where(y.abs() < _VANISHING * y.abs().max(), 0.0, y)
        own, behind = diagonal.rsqrt(), y.diagonal().rsqrt()
        if not (_scales_fit(own) and _scales_fit(behind) and _in_range(y)):
            return None
        # R = H - F F^T, its three blocks.
        first = torch.diag(diagonal) - blocks.read - factor.left @ factor.left.mT
        across = factor.left @ factor.solved - blocks.coupled
        last = y - blocks.behind - factor.solved.mT @ factor.solved
        errors = self._errors(blocks.terms, factor, y, own, behind)
        left = first.diagonal() * own, last.diagonal() * behind
        first, last = first.abs_().fill_diagonal_(0.0), last.abs_().fill_diagonal_(0.0)
        across.abs_()
        beside = first @ own + across @ behind, across.mT @ own + last @ behind
        rows = zip(left, beside, errors, strict=True)
        return y if all(_dominant(*row, self._terms + self._rows) for row in rows) else None

    def _errors(
        self, terms: Terms, factor: _Factor, y: Tensor, own: Tensor, behind: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scaled row sums of what rounding, and the errors of C, A and B, may change in R.

        Each entry of H is a sum of products of at most three numbers, that of R such a sum and
        ``F F^T``: rounding is within gamma of what their sizes sum to.
        """
        a, b, c = self._a, self._b, self._c
        read, off = c.back(own) + a.back(behind), c.spread_back(own) + a.spread_back(behind)
        if self._size is not None:
            read, off = self._size @ read, self._size @ off
        out, off_out = b.back(behind), b.spread_back(behind)
        product = terms.product.abs()
        mixed = torch.zeros_like(own) if terms.mixed is None else terms.mixed.abs()
        sizes = factor.magnitudes(own, behind)
        # Of whole vectors, what is read and what comes out have other sizes, and no m.
        crossed = torch.zeros_like(out) if terms.mixed is None else mixed * own
        relative = gamma(self._terms)
        first = c.times(read) + terms.diagonal * own + sizes[0]
        last = a.times(read) + y.abs() @ behind + b.times(product * out + crossed) + sizes[1]
        first = first * relative + c.spread(read + off) + c.times(off)
        last = last * relative + a.spread(read + off) + a.times(off)
        last = last + b.spread(product * (out + off_out) + crossed) + b.times(product * off_out)
        if terms.mixed is not None:
            first = first + mixed * (out * relative + off_out)
        return first, last


def _scales_fit(scales: Tensor) -> bool:
    return bool(((scales >= _SCALE_RANGE[0]) & (scales <= _SCALE_RANGE[1])).all())


def _dominant(diagonal: Tensor, beside: Tensor, errors: Tensor, roundings: int) -> bool:
    """Whether in each row the diagonal exceeds all the rest; NaN does not.

    Args:
        diagonal: scaled.
        beside: scaled sums of the sizes of the other entries.
        errors: what all entries may be off by, scaled and summed.
        roundings: of a term in one of these sums; there is room for twice as many.
    """
    rest = widened(beside + errors, 2 * roundings + 64) + _UNDERFLOWS
    return bool((diagonal * (1.0 - 2.0**-50) >= rest).all())


def _proved_output(problem: Problem, y: Tensor | None) -> float | None:
    r"""Some $\rho^2$ with $\rho^2 I - C Y C^T$ positive semidefinite."""
    if y is not None and not _in_range(y):
        return None
    found = output_products(problem, y)
    found = (found + found.mT) / 2
    if not bool(found.isfinite().all()):
        return None
    columns = sum(problem.steps[-1].behind) if problem.steps else sum(problem.inputs)
    rows = sum(problem.outputs)
    c = _Magnitudes(problem.output, rows, columns)
    ones = torch.ones_like(found[0])
    read, off = c.back(ones), c.spread_back(ones)
    if y is not None:
        read, off = y.abs() @ read, y.abs() @ off
    relative = gamma(2 * columns + rows + 16)
    errors = c.times(read) * relative + c.spread(read + off) + c.times(off)
    top = max(float(torch.linalg.eigvalsh(found)[-1]), 0.0)
    square = top * (1.0 + _EXCESS) + _LEAST_DIAGONAL
    eye = torch.eye(len(found), dtype=found.dtype, device=found.device)
    for attempt in range(_PROOF_ATTEMPTS):
        slack = 4.0**attempt
        rooms = 2.0 * float(errors.max()) + relative * 8.0 * square * len(found)
        square = square + 2.0 * slack * rooms
        left, info = torch.linalg.cholesky_ex((square - slack * rooms) * eye - found)
        if bool(info) or not bool(left.isfinite().all()) or not square <= _LARGEST**2:
            continue
        rest = square * eye - found - left @ left.mT
        sizes = left.abs() @ (left.abs().mT @ ones) + square
        diagonal = rest.diagonal().clone()
        beside = rest.abs().fill_diagonal_(0.0) @ ones
        roundings = 2 * (columns + rows)
        if _dominant(diagonal, beside, errors + sizes * relative, roundings):
            return square
    return None
