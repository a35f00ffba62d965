"""Multipliers to start from in a graph, in closed form.

No part of a proof: whatever is found is proved by `graph_certificate`, or not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_constraints import Constraint
from lipfast.estimators.upper.quadratic.graph_linear import Coefficients
from lipfast.estimators.upper.quadratic.graph_problem import Problem
from lipfast.estimators.upper.quadratic.graph_sweep import ChosenMultipliers

# Relative to the largest: smaller scales and importances of units are not told apart.
_LEAST_SCALE = 1e-6
# Above the least multipliers that are feasible, where a constraint has no mean.
_ROOM_ABOVE = 1e-6
# What the products of the path rule are raised by from step to step: each must leave room.
_ROOM_PER_STEP = 1e-8
# Known units have |m| / r infinite.
_MOST = 1e6
# Matrices up to this size: the largest eigenvalue by a full decomposition.
_DECOMPOSED = 400
_ITERATIONS = 30


def balanced_choice(problem: Problem, room: float = 1.0) -> ChosenMultipliers:
    r"""$D_j = \max(1 + |m_j| / r_j, 1 + 10^{-6}) \lambda S_j$, $S_j = \sqrt{K_{jj}} / c_j$.

    $\lambda$ is the largest eigenvalue of $S^{-1/2} K S^{-1/2}$ and $c_j$ how much unit j matters
    behind: the root of the sum of squares of what it is multiplied by on its paths to the outputs,
    taken as if their signs were random. Invariant under the scaling of units and of live tensors.

    Args:
        problem: the steps.
        room: what all are multiplied by.
    """
    importances = _importances(problem)

    def choose(index: int, k: Tensor) -> Tensor:
        constraint = problem.steps[index].constraint
        if constraint.means is None:
            largest = _largest_eigenvalue(k, torch.ones_like(k[0]))
            return ((1.0 + _ROOM_ABOVE) * room * largest).clamp_min(2.0**-100).reshape(1)
        scales = k.diagonal().clamp_min(0.0).sqrt() / _floored(importances[index])
        scales = _floored(scales)
        found = _margins(constraint) * _largest_eigenvalue(k, scales) * room * scales
        return found.clamp_min(2.0**-100)

    return choose


def _margins(constraint: Constraint) -> Tensor:
    """``1 + |m| / r``."""
    assert constraint.means is not None
    radii = (constraint.means.square() - constraint.products).clamp_min(0.0).sqrt()
    found: Tensor = 1.0 + constraint.means.abs() / radii
    return found.nan_to_num(_MOST).clamp(1.0 + _ROOM_ABOVE, _MOST)


def _floored(values: Tensor) -> Tensor:
    """At least a part of the largest; ones where all are zero."""
    largest = values.max()
    return (
        values.clamp_min(_LEAST_SCALE * largest) if bool(largest > 0) else torch.ones_like(values)
    )


def _largest_eigenvalue(k: Tensor, scales: Tensor) -> Tensor:
    """About that of ``S^-1/2 K S^-1/2``, rather above it."""
    roots = scales.rsqrt()
    if len(k) <= _DECOMPOSED:
        values: Tensor = torch.linalg.eigvalsh(roots[:, None] * k * roots)
        return values[-1].clamp_min(0.0)
    generator = torch.Generator(device="cpu").manual_seed(0)
    vectors = torch.randn(len(k), 4, generator=generator, dtype=torch.float64, device="cpu")
    vectors = vectors.to(k)
    for _ in range(_ITERATIONS):
        vectors = torch.linalg.qr(roots[:, None] * (k @ (roots[:, None] * vectors)))[0]
    image = roots[:, None] * (k @ (roots[:, None] * vectors))
    largest: Tensor = torch.linalg.matrix_norm(image, 2)
    return 1.01 * largest


def _importances(problem: Problem) -> list[Tensor]:
    """For each step and each unit how much it matters behind."""
    size = sum(problem.steps[-1].behind) if problem.steps else sum(problem.inputs)
    ones = problem.like.new_ones(sum(problem.outputs))
    weights = _squared_back(problem.output, ones, size)
    found = []
    for step in reversed(problem.steps):
        weights = weights / weights.max().clamp_min(2.0**-100)
        own = _squared_back(step.added, weights, step.constraint.outputs)
        found.append(own.sqrt())
        slopes = step.constraint.slopes.square()
        if step.constraint.means is None:
            read = (slopes * own.mean()).expand(step.constraint.inputs)
        else:
            read = slopes * own
        size = sum(step.before)
        kept = _squared_back(step.kept, weights, size)
        weights = _squared_back(step.read, read, size) + kept
    return found[::-1]


def _squared_back(matrix: Coefficients | None, weights: Tensor, size: int) -> Tensor:
    """Sums over the rows of the squares of entries, weighted."""
    if matrix is None:
        return weights.new_zeros(size)
    return weights if matrix.value is None else matrix.value.square().mT @ weights


class _Norms:
    """Norms of the blocks of a matrix: rows that belong to tensors times columns that do."""

    def __init__(
        self, matrix: Coefficients | None, rows: Sequence[int], columns: Sequence[int]
    ) -> None:
        self.table = [[0.0] * len(columns) for _ in rows]
        if matrix is None:
            return
        top = 0
        for i, height in enumerate(rows):
            left = 0
            for j, width in enumerate(columns):
                if matrix.value is None:
                    self.table[i][j] = float(top == left and height == width)
                else:
                    part = matrix.value[top : top + height, left : left + width]
                    self.table[i][j] = _norm_of_part(part)
                left += width
            top += height

    def times(self, vector: Sequence[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in self.table]

    def transposed_times(self, vector: Sequence[float]) -> list[float]:
        columns = zip(*self.table, strict=True)
        return [sum(a * b for a, b in zip(column, vector, strict=True)) for column in columns]


def _norm_of_part(part: Tensor) -> float:
    """About the spectral norm."""
    if not bool(part.any()):
        return 0.0
    gram = part @ part.mT if part.shape[0] <= part.shape[1] else part.mT @ part
    return float(_largest_eigenvalue(gram, torch.ones_like(gram[0])).sqrt())


def multipliers_of_paths(problem: Problem) -> tuple[list[Tensor], float]:
    r"""Multipliers that give the sum over all paths of the products of norms, and that sum.

    With $F_k$ the bound of what step k reads and $B_k$ the factor by which it enters that of the
    outputs, $L$, one multiplier $d_k = L F_k / B_k$ for all of a step's entries proves L: between
    any two steps $\sum_e (F_e / B_e) \|g_e\|^2 L$ over the live tensors falls from $L^2 \|t\|^2$ to
    $\|g_0\|^2$, by Cauchy and Schwarz at tensors that are read twice. Unit by unit it is
    $(1 + |m_j| / r_j) d_k$.
    """
    read, kept, added = [], [], []
    forward = [1.0] * len(problem.inputs)
    bounds = []
    for step in problem.steps:
        c = step.constraint
        read.append(_Norms(step.read, (c.inputs,), step.before))
        kept.append(_Norms(step.kept, step.behind, step.before))
        added.append(_Norms(step.added, step.behind, (c.outputs,)))
        bounds.append(read[-1].times(forward)[0])
        own = bounds[-1] * float(c.slopes.max())
        new = zip(kept[-1].times(forward), added[-1].times([own]), strict=True)
        forward = [a + b for a, b in new]
    output = _Norms(problem.output, problem.outputs, _last(problem))
    parts_of_outputs = output.times(forward)
    total = math.hypot(*parts_of_outputs)
    back = output.transposed_times([part / total if total else 0.0 for part in parts_of_outputs])
    found: list[Tensor] = []
    for index in range(len(problem.steps) - 1, -1, -1):
        c = problem.steps[index].constraint
        factor = added[index].transposed_times(back)[0] * float(c.slopes.max())
        d = total * bounds[index] / factor if factor else 2.0**100
        d = max(d * (1.0 + _ROOM_PER_STEP) ** (2 * index + 1), 2.0**-100)
        own_margin = (
            problem.like.new_ones(1) * (1 + _ROOM_PER_STEP) if c.means is None else _margins(c)
        )
        found.append(d * own_margin)
        parts = zip(
            kept[index].transposed_times(back), read[index].transposed_times([factor]), strict=True
        )
        back = [a + b for a, b in parts]
    return found[::-1], total


def _last(problem: Problem) -> tuple[int, ...]:
    return problem.steps[-1].behind if problem.steps else problem.inputs
