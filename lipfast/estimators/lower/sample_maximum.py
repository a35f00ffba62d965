"""Lower bounds: the largest Jacobian norm over samples, and the certified secant beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast._clock import running
from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import missing_error_rules
from lipfast.estimators.estimate import Estimate, log_down
from lipfast.estimators.jacobian.function import check_samples
from lipfast.estimators.jacobian.norms import fused_chain, plan_jacobian_norms
from lipfast.estimators.lower.secants import certified_secants
from lipfast.estimators.results import LowerBound, Search
from lipfast.norms import Norm, check_norm
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_all

_AT_KINKS = "not proved: floating point, and at a kink autograd's value is not a derivative"


def lower_bounds(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    x: Tensor,
    *,
    norm: Norm = 2,
    per_sample: bool = False,
    memory: int = 1 << 30,
    domain: Domain | None = None,
) -> list[LowerBound]:
    """Lower bounds on the Lipschitz constants of many networks, from samples.

    ``jacobian = max_b ||J(x_b)||`` (Khromov and Singh, 2024) is a lower bound wherever the network
    is differentiable, up to rounding; the bound's `value` is the certified difference quotient
    ``||f(a) - f(b)|| / ||a - b||`` near the arg-max sample (see `estimators.lower.secants`).

    Args:
        plan: the architecture, with one input.
        state_dicts: one or many.
        x: samples (B, D...).
        norm: 1, 2 or inf.
        per_sample: keep the Jacobian norm of every sample.
        memory: bytes that intermediate tensors may take.
        domain: the certified difference quotient is of two points in this set.

    Returns:
        One `LowerBound` per state dict.

    Raises:
        ArgumentError, NonFiniteError: the samples do not fit, or hold NaN or Inf.
        StateDictError, NonFiniteError: a state dict does not fit the architecture.
    """
    norm = check_norm(norm)
    if len(plan.input_shapes) != 1:
        raise ArgumentError(
            f"lower bounds need a model with one input; this one has {len(plan.input_shapes)}"
        )
    x = check_samples(x, plan.input_shapes[0])
    tensors = resolve_all(plan, state_dicts)
    if not tensors:
        return []
    norms = finite_norms(plan, tensors, x, norm, memory)
    largest, positions = norms.max(1)
    missing = missing_error_rules(plan)
    secants = (
        None
        if missing
        else certified_secants(plan, tensors, x[positions], norm=norm, memory=memory, domain=domain)
    )
    flushed = denormals_flushed()
    label = jacobian_label(plan, norm)
    statistics = zip(norms, largest.tolist(), positions.tolist(), strict=True)
    return [
        assembled(
            Statistics.of(entry, value, position, keep=per_sample),
            norm=norm,
            label=label,
            point=x[position],
            secant=None if secants is None else secants.of(index),
            why_not=_missing(missing),
            flushed=flushed,
        )
        for index, (entry, value, position) in enumerate(statistics)
    ]


def jacobian_label(plan: Architecture, norm: Norm) -> str:
    """How the Jacobian norms of a plan are computed, as estimates say it."""
    method = "fused chain" if norm == 2 and plan.chain is not None else "autograd"
    return f"maximum Jacobian norm ({method})"


def _missing(ops: Sequence[str]) -> str | None:
    return f"no rule for the rounding errors of {', '.join(ops)}" if ops else None


@dataclass(frozen=True)
class Statistics:
    """Jacobian norms over the samples.

    Attributes:
        largest: their maximum.
        position: the sample that it belongs to.
        mean: over the samples.
        rms: root mean square over the samples.
        samples: how many.
        per_sample: the norms, if they are to be kept.
    """

    largest: float
    position: int
    mean: float
    rms: float
    samples: int
    per_sample: Tensor | None

    @staticmethod
    def of(norms: Tensor, largest: float, position: int, *, keep: bool) -> Statistics:
        """From the norms (samples,) and their maximum."""
        wide = norms.double()
        mean, rms = float(wide.mean()), float(wide.square().mean().sqrt())
        return Statistics(largest, position, mean, rms, len(norms), norms if keep else None)


def finite_norms(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], x: Tensor, norm: Norm, memory: int
) -> Tensor:
    """Jacobian norms (networks, B); networks that overflow float32 again in float64."""
    # Then it is the native op and little else.
    fused = fused_chain(plan, norm, x.device) is not None
    with running("chain_jacobian_norms") if fused else nullcontext():
        norms = plan_jacobian_norms(plan, tensors, x, norm=norm, memory=memory)
    broken = (~torch.isfinite(norms)).any(1).nonzero().flatten().tolist()
    if not broken:
        return norms
    wide = norms.double()
    again = plan_jacobian_norms(
        plan,
        [tensors[index] for index in broken],
        x,
        norm=norm,
        dtype=torch.float64,
        memory=memory,
    )
    # What overflows even float64 is NaN or inf; either way it is too large.
    wide[broken] = torch.nan_to_num(again, nan=math.inf, posinf=math.inf)
    return wide


def assembled(
    statistics: Statistics,
    *,
    norm: Norm,
    label: str,
    point: Tensor,
    secant: tuple[float, Tensor] | None,
    why_not: str | None,
    flushed: bool,
    search: Search | None = None,
) -> LowerBound:
    """The bound: the certified quotient and its points, or what was found, with the reason."""
    value = statistics.largest
    jacobian = Estimate(
        value,
        log_down(value),
        "lower",
        norm,
        label,
        certified=False,
        reason=_AT_KINKS if math.isfinite(value) else "the Jacobian is not finite in float64",
    )
    reason, method = why_not, "certified secant"
    if secant is None:
        proved, method = value, label
        points = point.double().expand(2, *point.shape).clone()
        if search is not None and search.estimate.value > value:
            proved, method = search.estimate.value, search.estimate.method
            best = search.points[0].double()
            points = best.clone() if best.dim() > point.dim() else best.expand(2, *best.shape)
    else:
        proved, points = secant
        if flushed:
            reason = FLUSHED
        elif proved == 0 and value != 0:
            reason = "no difference of outputs could be proved, so only that it is not negative"
    return LowerBound(
        value=proved,
        log_value=log_down(proved),
        side="lower",
        norm=norm,
        method=method,
        certified=secant is not None and not flushed,
        reason=reason,
        jacobian=jacobian,
        sample=statistics.position,
        points=points,
        mean=statistics.mean,
        rms=statistics.rms,
        samples=statistics.samples,
        per_sample=statistics.per_sample,
        search=search,
    )
