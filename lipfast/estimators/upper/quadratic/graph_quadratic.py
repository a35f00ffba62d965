"""Upper bounds of networks that are no chains, by quadratic constraints on their activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_certificate import GraphProof, proved_square
from lipfast.estimators.upper.quadratic.graph_problem import (
    EntrySlopes,
    Problem,
    in_single,
    problem_of,
)
from lipfast.estimators.upper.quadratic.graph_room import SEARCHED_IN_SINGLE, QuadraticBoundError
from lipfast.estimators.upper.quadratic.graph_search import searched
from lipfast.estimators.upper.quadratic.graph_sweep import GraphSweep, Swept
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.rules.upward import Upward


class GraphQuadratic(NamedTuple):
    """A bound of one network.

    Attributes:
        value: certified upper bound; infinite where nothing was proved.
        log_value: its natural logarithm, rounded up.
        logs: for each step, by the name of its node, log2 of the multipliers that it was proved
            with, in the units of the network: what similar networks start from.
        reason: why nothing was proved.
    """

    value: float
    log_value: float
    logs: Mapping[str, Tensor]
    reason: str | None = None


@plain_arithmetic()
def graph_quadratic(
    plan: Architecture,
    parameters: Mapping[str, Tensor],
    *,
    evaluations: int = 30,
    memory: int = 1 << 30,
    operations: float = math.inf,
    start: Mapping[str, Tensor] | None = None,
    slopes: EntrySlopes | None = None,
) -> GraphQuadratic:
    r"""A certified bound of $\|J\|_2$ for all slopes that activations may have.

    Sweeps through the graph carry a matrix of the tensors that are alive; multipliers of the
    activations' constraints are searched for, and what was found is proved step by step.

    Args:
        plan: the architecture.
        parameters: of one network, resolved.
        evaluations: of the search, after its starts.
        memory: bytes that all its matrices may take together.
        operations: multiplications and additions that it may take.
        start: `GraphQuadratic.logs` of a similar network.
        slopes: ranges of slopes on a domain; of other nodes their rules are asked.
    """
    try:
        problem = problem_of(
            plan,
            parameters,
            memory=memory,
            operations=operations,
            evaluations=evaluations,
            slopes=slopes,
        )
        if problem.output is None:
            return GraphQuadratic(0.0, -math.inf, {})
        begin = None if start is None else _in_order(problem, start)
        sweep, swept = _search(problem, evaluations, begin)
    except QuadraticBoundError as reason:
        return _no_bound(str(reason))
    if swept is None:
        return _no_bound("no multipliers were found: the numbers are too far apart")
    multipliers = [own.to(problem.like) for own in swept.multipliers]
    del swept  # the proof needs the memory
    return _answer(problem, proved_square(problem, multipliers, sweep.shifts), sweep)


def _search(
    problem: Problem, evaluations: int, start: Sequence[Tensor] | None
) -> tuple[GraphSweep, Swept | None]:
    """Large networks are searched in float32, which takes half the time, where that goes."""
    largest = max((max(sum(s.before), s.constraint.inputs) for s in problem.steps), default=0)
    if largest >= SEARCHED_IN_SINGLE:
        sweep = GraphSweep(in_single(problem))
        swept = searched(sweep, evaluations, start)
        if swept is not None:
            return sweep, swept
    sweep = GraphSweep(problem)
    return sweep, searched(sweep, evaluations, start)


def _in_order(problem: Problem, start: Mapping[str, Tensor]) -> Sequence[Tensor] | None:
    """The logarithms of all steps; None where they are not those of such a network."""
    found = [start.get(step.name) for step in problem.steps]
    sizes = [step.constraint.multipliers for step in problem.steps]
    known = [own.to(problem.like) for own in found if own is not None]
    fits = [own.shape == (size,) for own, size in zip(known, sizes, strict=False)]
    return known if len(known) == len(sizes) and all(fits) else None


def _no_bound(reason: str) -> GraphQuadratic:
    return GraphQuadratic(math.inf, math.inf, {}, reason)


def _answer(problem: Problem, proof: GraphProof, sweep: GraphSweep) -> GraphQuadratic:
    if proof.reason is not None:
        return _no_bound(proof.reason)
    root = Upward.of(proof.square).square_root()
    bound = Upward(root.mantissa, root.exponent + proof.scale)
    logs = {
        step.name: torch.log2(own) + 2 * sweep.scale(index)
        for index, (step, own) in enumerate(zip(problem.steps, proof.multipliers, strict=True))
    }
    return GraphQuadratic(bound.value, bound.log, logs)
