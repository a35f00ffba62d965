"""Lower and upper bounds of many networks together, their order asserted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import Unpack

from lipfast.estimators.floor.found import floors
from lipfast.estimators.lower.many_networks import lower_bounds
from lipfast.estimators.options import LowerOptions, UpperMethod, check_flags, upper_step
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import Bounds, ordered
from lipfast.estimators.samples import SampleStream
from lipfast.estimators.upper.spectral_product import product_bounds
from lipfast.norms import check_norm
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, checked_all, resolve_all


def bounds_from(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    samples: SampleStream,
    *,
    rtol: float,
    seed: int,
    method: UpperMethod,
    effort: int,
    floor: bool,
    **shared: Unpack[LowerOptions],
) -> list[Bounds]:
    """`Plan.bounds` of checked options and opened data."""
    norm, domain = check_norm(shared["norm"]), shared["domain"]
    check_flags(floor=floor)
    state_dicts = checked_all(plan, state_dicts)
    with shown_progress(upper_step(method), None, shared["progress"]):
        uppers, _ = product_bounds(
            plan,
            state_dicts,
            norm=norm,
            rtol=rtol,
            seed=seed,
            domain=domain,
            method=method,
            effort=effort,
            memory=int(shared["memory"]),
        )
    lowers = lower_bounds(plan, state_dicts, samples, **shared)
    if not floor or not lowers:
        return [ordered(lower, upper) for lower, upper in zip(lowers, uppers, strict=True)]
    found = floors(
        plan,
        list(resolve_all(plan, state_dicts)),
        norm=norm,
        effort=effort,
        seed=seed,
        memory=int(shared["memory"]),
        progress=shared["progress"],
        points=torch.stack([lower.sample_point for lower in lowers]),  # type: ignore[misc]
    )
    return [ordered(*row) for row in zip(lowers, uppers, found, strict=True)]
