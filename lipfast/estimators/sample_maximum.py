"""Lower bounds: the largest Jacobian norm over samples, and the certified secant beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.certificate import Secants, certified_secants, missing_error_rules
from lipfast.estimators.domain import Domain
from lipfast.estimators.estimate import Estimate, LowerBound, log_down
from lipfast.estimators.function import check_samples
from lipfast.estimators.jacobian import plan_jacobian_norms
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.plan.chain import find_chain
from lipfast.plan.plan import Plan, StateDict
from lipfast.rules.registry import Norm, check_norm

_NOT_PROVED = "not proved: floating point, and at a kink autograd's value is not a derivative"


def lower_bounds(
    plan: Plan,
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
    ``||f(a) - f(b)|| / ||a - b||`` near the arg-max sample (see `estimators.certificate`).

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
    tensors = plan.resolve_all(state_dicts)
    if not tensors:
        return []
    norms = _finite_norms(plan, tensors, x, norm, memory)
    largest, positions = norms.max(1)
    missing = missing_error_rules(plan)
    secants = (
        None
        if missing
        else certified_secants(plan, tensors, x[positions], norm=norm, memory=memory, domain=domain)
    )
    wide = norms.double()
    method = "fused chain" if norm == 2 and find_chain(plan) is not None else "autograd"
    found = _Found(
        x=x,
        norm=norm,
        method=f"maximum Jacobian norm ({method})",
        largest=largest.tolist(),
        positions=positions.tolist(),
        means=wide.mean(1).tolist(),
        rms=wide.square().mean(1).sqrt().tolist(),
        per_sample=list(norms) if per_sample else None,
        secants=secants,
        missing=missing,
        flushed=denormals_flushed(),
    )
    return [_lower_bound(found, index) for index in range(len(tensors))]


@dataclass(frozen=True)
class _Found:
    """What was found for all networks, as plain numbers read once."""

    x: Tensor
    norm: Norm
    method: str
    largest: list[float]
    positions: list[int]
    means: list[float]
    rms: list[float]
    per_sample: list[Tensor] | None
    secants: Secants | None
    missing: list[str]
    flushed: bool


def _finite_norms(
    plan: Plan, tensors: Sequence[Mapping[str, Tensor]], x: Tensor, norm: Norm, memory: int
) -> Tensor:
    """Jacobian norms (networks, B); networks that overflow float32 again in float64."""
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


def _lower_bound(found: _Found, index: int) -> LowerBound:
    value, sample = found.largest[index], found.positions[index]
    jacobian = Estimate(
        value,
        log_down(value),
        "lower",
        found.norm,
        found.method,
        certified=False,
        reason=_NOT_PROVED if math.isfinite(value) else "the Jacobian overflows float64",
    )
    reason: str | None = None
    if found.secants is None:
        proved = value
        points = found.x[sample].double().expand(2, *found.x.shape[1:]).clone()
        reason = f"no rule for the rounding errors of {', '.join(found.missing)}"
    else:
        proved = float(found.secants.values[index])
        points = found.secants.points[index]
        if found.flushed:
            reason = FLUSHED
        elif proved == 0 and value != 0:
            reason = "no difference of outputs could be proved, so only that it is not negative"
    return LowerBound(
        value=proved,
        log_value=log_down(proved),
        side="lower",
        norm=found.norm,
        method=found.method if found.secants is None else "certified secant",
        certified=found.secants is not None and not found.flushed,
        reason=reason,
        jacobian=jacobian,
        sample=sample,
        points=points,
        mean=found.means[index],
        rms=found.rms[index],
        samples=found.x.shape[0],
        per_sample=None if found.per_sample is None else found.per_sample[index],
    )
