"""Lower bounds: the largest Jacobian norm over samples, and the certified secant beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast._clock import running
from lipfast.estimators.estimate import Estimate, log_down
from lipfast.estimators.jacobian.networks import fused_chain, plan_jacobian_norms
from lipfast.estimators.jacobian.networks_later import plan_norms_later
from lipfast.estimators.results import LowerBound, Search
from lipfast.norms import Norm
from lipfast.ops.denormals import FLUSHED
from lipfast.plan.architecture import Architecture

_AT_KINKS = "not proved: floating point, and at a kink autograd's value is not a derivative"


def finite_norms(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], x: Tensor, norm: Norm, memory: int
) -> Tensor:
    """Jacobian norms (networks, B); networks that overflow float32 again in float64."""
    # Then it is the native op and little else.
    fused = fused_chain(plan, norm, x.device) is not None
    with running("chain_jacobian_norms") if fused else nullcontext():
        norms, fine = _looked_at(plan, tensors, x, norm=norm, memory=memory)
    broken = [index for index in range(len(norms)) if not fine[index]]
    if not broken:
        return norms
    wide = norms.double()
    those = [tensors[index] for index in broken]
    again, _ = _looked_at(plan, those, x, norm=norm, memory=memory, dtype=torch.float64)
    # What overflows even float64 is NaN or inf; either way it is too large.
    wide[broken] = torch.nan_to_num(again, nan=math.inf, posinf=math.inf)
    return wide


def _looked_at(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    *,
    norm: Norm,
    memory: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, list[bool]]:
    """Jacobian norms (networks, B), and which networks' are finite; a device is waited for."""
    if not x.is_cpu:
        later = plan_norms_later(plan, tensors, x, norm=norm, dtype=dtype, memory=memory)
        flags, norms = later.fetched(), later.values
        fine: list[bool] = torch.isfinite(norms).all(1).tolist()
        if flags.hold():
            unfinished = flags.unfinished()
            if unfinished:
                found = later.again(list(unfinished), list(unfinished.values()))
                rows = dict(zip(unfinished, found, strict=True))
                norms = torch.stack([rows.get(index, own) for index, own in enumerate(norms)])
                fine = torch.isfinite(norms).all(1).tolist()
            return norms, fine
    norms = plan_jacobian_norms(plan, tensors, x, norm=norm, dtype=dtype, memory=memory)
    return norms, torch.isfinite(norms).all(1).tolist()


class Sample(NamedTuple):
    """What was found of one network from samples.

    Attributes:
        norms: Jacobian norms of the samples.
        value: their maximum.
        position: the sample that it belongs to.
        point: that sample.
        mean: of the norms.
        rms: root of the mean of their squares.
    """

    norms: Tensor
    value: float
    position: int
    point: Tensor
    mean: float
    rms: float


def assembled(
    found: Sample,
    *,
    norm: Norm,
    plan: Architecture | None,
    keep: bool,
    secant: tuple[float, Tensor] | None,
    why_not: str | None,
    flushed: bool,
    search: Search | None = None,
) -> LowerBound:
    """The bound: the certified quotient and its points, or what was found, with the reason.

    Args:
        found: from the samples.
        norm: 1, 2 or inf.
        plan: of the model, if it has one.
        keep: whether the norms of all samples are to be kept.
        secant: the certified quotient and its points, if there is one.
        why_not: why there is none.
        flushed: whether denormals are flushed, so that nothing is proved.
        search: what a search found.
    """
    fused = norm == 2 and plan is not None and plan.chain is not None
    label = f"maximum Jacobian norm ({'fused chain' if fused else 'autograd'})"
    norms, value, position, point, mean, rms = found
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
        given=() if plan is None or secant is None else plan.rules_given,
        jacobian=jacobian,
        sample=position,
        points=points,
        mean=mean,
        rms=rms,
        samples=len(norms),
        per_sample=norms if keep else None,
        search=search,
        sample_point=point,
    )
