r"""Bounds in norms 1 and inf by quadratic constraints, one row or column of Jacobians at a time.

With scales s > 0, $\|g\|_1 \le \sqrt{\sum_i s_i^{-2}} \|\mathrm{diag}(s) g\|_2$ (Cauchy and
Schwarz): a bound in norm 2 of the network from scaled inputs to one output bounds the sum of a row,
and one from one input to scaled outputs that of a column. For $s_i = |g_i|^{-1/2}$ nothing is lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from lipfast.estimators.upper.many import Tighter
from lipfast.estimators.upper.quadratic.bounds import QUADRATIC
from lipfast.estimators.upper.quadratic.chains import ChainNumbers, matrix_chain
from lipfast.estimators.upper.quadratic.graph_problem import EntrySlopes
from lipfast.estimators.upper.sweep import Sweep
from lipfast.norms import Norm
from lipfast.ops.chain_quadratic import chain_quadratic
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rounding import SMALLEST, UNIT_ROUNDOFF, widened
from lipfast.rules.upward import Upward

# By effort: sweeps of a search, and what part of the mean size of entries is added to each before
# scales are made of them: the more the slopes may vary, the more.
_ROW_SEARCHES: dict[int, tuple[int, tuple[float, ...]]] = {
    1: (10, (0.5,)),
    2: (30, (0.1, 1.0)),
    3: (30, (0.03, 0.1, 0.3, 1.0, 3.0)),
}
# Of one network: rows, times the cubes of widths, times sweeps.
_MOST_WORK = 1 << 38


def row_bounds(
    plan: Architecture,
    sweep: Sweep,
    networks: ResolvedNetworks,
    norm: Norm,
    *,
    effort: int,
    slopes: Sequence[EntrySlopes] | None,
) -> Tighter | str:
    """Certified bounds in norm 1 or inf, or why there are none.

    Args:
        plan: the architecture.
        sweep: of the graph that the networks are bounded by.
        networks: their parameters, with those that are new in the graph.
        norm: 1 or inf.
        effort: how long multipliers are searched for: 1, 2 or 3.
        slopes: for each network ranges of slopes on a domain.
    """
    chain = matrix_chain(sweep)
    here = all(tensor.is_cpu for tensor in networks[0].values())
    local: Sequence[EntrySlopes | None] = slopes or [None] * len(networks)
    if chain is None or not here:
        return f"quadratic constraints in norm {norm:g} are for chains of matrices on the CPU"
    evaluations, shares = _ROW_SEARCHES[effort]
    bounds: list[Upward] = []
    reasons: list[str | None] = []
    for entry, own in zip(networks, local, strict=True):
        numbers = chain.numbers(plan, entry, own)
        bound, why = Upward(math.inf), None
        rows = None if numbers is None else _Rows(numbers.without_dead_units(), norm)
        if rows is None:
            why = "an activation has no slopes"
        elif rows.work * evaluations * len(shares) > _MOST_WORK:
            why = "one network for each row takes too long"
        else:
            largest = Upward.of(rows.bounds(shares, evaluations))
            bound = largest * chain.last_constant(plan, entry, norm)
            why = "numbers leave float64" if bound.unbounded else None
        bounds.append(bound)
        reasons.append(why and f"no quadratic constraints in norm {norm:g}: {why}")
    values, logs = [own.value for own in bounds], [own.log for own in bounds]
    return Tighter(QUADRATIC, values, logs, reasons=reasons)


class _Rows:
    """One network, whose rows (norm inf) or columns (norm 1) of Jacobians are bounded."""

    def __init__(self, numbers: ChainNumbers, norm: Norm) -> None:
        self._weights = [weight.double() for weight in numbers.weights]
        self._errors, self._means, self._products = numbers[1:]
        self._norm = norm
        pairs = zip(self._means, self._weights[1:], strict=True)
        middle = reduce(lambda j, pair: (pair[1] * pair[0]) @ j, pairs, self._weights[0]).abs()
        self._sizes = middle if math.isinf(norm) else middle.mT

    @property
    def work(self) -> int:
        """About how many operations a sweep of all rows takes."""
        return len(self._sizes) * sum(len(weight) ** 3 for weight in self._weights)

    def bounds(self, shares: Sequence[float], evaluations: int) -> float:
        """The largest sum of a row or column, each as the best scales bound it."""
        sums = [self._with_scales(share, evaluations) for share in shares]
        return float(torch.stack(sums).amin(0).max())

    def _with_scales(self, share: float, evaluations: int) -> Tensor:
        sizes = self._sizes + share * self._sizes.mean(1, keepdim=True)
        known = sizes.isfinite() & (sizes > 2.0**-200) & (sizes < 2.0**200)
        scales = torch.where(known.all(1, keepdim=True), sizes, 1.0).rsqrt()
        # Of few digits, so that most products with weights are exact.
        scales = scales.bfloat16().double()
        pairs = [self._scaled(row, own) for row, own in enumerate(scales)]
        found = chain_quadratic(
            [weights for weights, _ in pairs],
            self._means,
            self._products,
            errors=[errors for _, errors in pairs],
            evaluations=evaluations,
        )
        lengths = widened(scales.square().reciprocal().sum(1), scales.shape[1] + 4).sqrt()
        # Also where the bound is a denormal number, which the length may be rounded with.
        return widened(found.values * widened(lengths, 4), 4) + SMALLEST

    def _scaled(self, row: int, scales: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """From scaled inputs to one output, or from one input to scaled outputs."""
        weights, errors = list(self._weights), list(self._errors)
        one, inputs = slice(row, row + 1), math.isinf(self._norm)
        at, other = (0, -1) if inputs else (-1, 0)
        factors = scales if inputs else scales[:, None]
        before, wrong = weights[at], errors[at]
        weights[at] = before * factors
        # 24 digits times 8 are a float64, if it is no denormal.
        short = before.float().double() == before
        exact = short & ((weights[at].abs() > 2.0**-900) | (before == 0))
        if wrong is not None or not bool(exact.all()):
            rounding = weights[at].abs() * (2 * UNIT_ROUNDOFF) + SMALLEST
            errors[at] = rounding if wrong is None else widened(wrong * factors + rounding, 4)
        cut = (one, slice(None)) if inputs else (slice(None), one)
        weights[other] = weights[other][cut].contiguous()
        own = errors[other]
        errors[other] = None if own is None else own[cut].contiguous()
        return weights, errors
