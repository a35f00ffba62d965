r"""The sweep over a graph: how much of the inputs' difference each live tensor can hold.

A symmetric Y with $d b \, d b^T \preceq Y \|d x\|^2$ for the live tensors b is carried from step to
step, for given multipliers. No part of a proof: `graph_certificate` proves what this finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_blocks import (
    Products,
    added_products,
    coupling,
    output_products,
    products_of,
    terms_of,
)
from lipfast.estimators.upper.quadratic.graph_problem import GraphStep, Problem


class Passed(NamedTuple):
    """What the way back needs of a step: L of ``D - K = L L^T``, and L^-1 times the coupling."""

    factor: Tensor
    solved: Tensor


@dataclass(frozen=True, eq=False)
class Swept:
    """A sweep that went through: multipliers, steps, and Y of the outputs."""

    multipliers: list[Tensor]
    passed: list[Passed]
    outputs: Tensor

    @property
    def root(self) -> float:
        """About the bound, in the scale of the sweep."""
        return math.sqrt(max(0.0, self.square))

    @property
    def square(self) -> float:
        """About the square of the bound, in the scale of the sweep."""
        return float(torch.linalg.eigvalsh(self.outputs)[-1])


ChosenMultipliers = Callable[[int, Tensor], Tensor]
"""Multipliers of a step from its index and K."""


class GraphSweep:
    """Sweeps over the steps of one network.

    Attributes:
        problem: the steps.
        shifts: behind each step Y is divided by ``4^shift``, multipliers of later steps too.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.shifts = [0] * len(problem.steps)
        self._first = products_of(problem.steps[0], None, problem.like) if problem.steps else None

    def scale(self, index: int) -> int:
        """Sum of the shifts before a step: ``D 4^scale`` belongs to the network as it is."""
        return sum(self.shifts[:index])

    def products(self, index: int, y: Tensor | None) -> Products:
        """`products_of` a step; those of the first step depend on nothing."""
        first = self._first if index == 0 else None
        return first or products_of(self.problem.steps[index], y, self.problem.like)

    def forward(
        self, multipliers: Sequence[Tensor] | ChosenMultipliers, *, rescale: bool = False
    ) -> Swept | None:
        """Y step by step; None where multipliers are too small.

        Args:
            multipliers: of all steps, or how to choose them.
            rescale: choose `shifts` so that Y stays about 1.
        """
        y: Tensor | None = None
        passed, chosen = [], []
        for index, step in enumerate(self.problem.steps):
            products = self.products(index, y)
            own = multipliers(index, products.read) if callable(multipliers) else multipliers[index]
            found = step_forward(step, products, own)
            if found is None:
                return None
            y, own_passed = found
            if rescale:
                size = float(y.diagonal().mean())
                if not 0.0 < size < math.inf:
                    return None
                self.shifts[index] = round(math.log2(size) / 2)
            y = y * 4.0 ** -self.shifts[index]
            passed.append(own_passed)
            chosen.append(own)
        outputs = output_products(self.problem, y)
        return Swept(chosen, passed, outputs) if bool(outputs.isfinite().all()) else None

    def backward(self, swept: Swept, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        r"""How the outputs' Y depends on each multiplier, weighted by $Q Q^T$.

        Args:
            swept: of `forward`.
            weights: Q, (outputs, columns).

        Returns:
            For each step $\sum s^2$ and $\sum 2 m s q - p q^2$ over the columns: the derivative is
            the second less the first.
        """
        output = self.problem.output
        assert output is not None
        w = weights if output.value is None else output.value.mT @ weights
        taken: list[Tensor] = []
        given: list[Tensor] = []
        pairs = list(zip(self.problem.steps, swept.passed, self.shifts, strict=True))
        for step, passed, shift in reversed(pairs):
            w = w * 2.0**-shift
            s = torch.linalg.solve_triangular(passed.factor.mT, passed.solved @ w, upper=True)
            q = w if step.added.value is None else step.added.value.mT @ w
            constraint = step.constraint
            if constraint.means is None:
                taken.append(s.square().sum().reshape(1))
                given.append(-constraint.products * q.square().sum())
            else:
                m, p = constraint.means[:, None], constraint.products[:, None]
                taken.append(s.square().sum(1))
                given.append((2 * m * s * q - p * q.square()).sum(1))
            behind = w
            w = s if step.read.value is None else step.read.value.mT @ s
            if step.kept is not None:
                a = step.kept.value
                w = w + (behind if a is None else a.mT @ behind)
        return taken[::-1], given[::-1]


def step_forward(
    step: GraphStep, products: Products, multipliers: Tensor
) -> tuple[Tensor, Passed] | None:
    """Y behind one step, as small as its inequality allows; None where D - K is not positive."""
    terms = terms_of(step.constraint, multipliers)
    gap = torch.diag(terms.diagonal) - products.read
    factor, info = torch.linalg.cholesky_ex(gap)
    if bool(info) or not bool(factor.isfinite().all()):
        return None
    solved = torch.linalg.solve_triangular(factor, coupling(step, terms, products), upper=False)
    y = solved.mT @ solved - added_products(step, terms.product)
    return (y if products.kept is None else y + products.kept), Passed(factor, solved)
