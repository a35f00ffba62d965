"""Both bounds of many networks of one architecture, and what they took: what a scorer calls."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast._clock import clocked
from lipfast.estimators.jacobian.networks import fused_chain
from lipfast.estimators.options import UpperMethod
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import LowerBound
from lipfast.estimators.upper.many import UpperBounds
from lipfast.estimators.upper.quadratic.certificate import Multipliers
from lipfast.estimators.upper.spectral_product import upper_bounds_together
from lipfast.estimators.upper.starts import StartVectors
from lipfast.norms import Norm
from lipfast.ops.threads import native_ops_alone
from lipfast.plan.checked import StateDict


@dataclass(frozen=True)
class BatchBounds:
    """Bounds of the networks of a batch, in their order.

    Attributes:
        uppers: upper bounds, in arrays.
        lowers: lower bounds.
        seconds: what the stages `upper` and `lower` took, and of this `ops`, the native ops.
    """

    uppers: UpperBounds
    lowers: list[LowerBound]
    seconds: dict[str, float]


def batch_bounds(
    plan: Plan,
    state_dicts: Sequence[StateDict],
    x: Tensor,
    *,
    norm: Norm,
    seed: int,
    start: Sequence[StartVectors | None] | None,
    memory: int,
    method: UpperMethod = "product",
    warm: Sequence[Multipliers | None] | None = None,
) -> BatchBounds:
    """Upper and lower bounds of many networks, as `Plan.upper` and `Plan.lower` compute them.

    Args:
        plan: the architecture.
        state_dicts: of `lipfast.plan.checked.checked_all`, which are not checked again.
        x: samples (B, D...), on the device of the state dicts.
        norm: 1, 2 or inf.
        seed: of the start vectors.
        start: start vectors of each network, None where there are none (for all or for one).
        memory: bytes that intermediate tensors may take.
        method: of the upper bounds, see `Plan.upper`; with the least effort.
        warm: what quadratic constraints of each network start from, if there is something.

    Raises:
        LipfastError: as these raise, for the batch as a whole.
    """
    inside: Counter[str] = Counter()
    started = time.perf_counter()
    with clocked(inside), native_ops_alone() if _is_native(plan, norm) else nullcontext():
        uppers = upper_bounds_together(
            plan,
            state_dicts,
            norm=norm,
            seed=seed,
            start=start,
            method=method,
            effort=1,
            warm=warm,
            follow=False,
            # What the host's graphs may take does not depend on how many checkpoints it holds.
            memory=memory if x.is_cuda else 1 << 30,
        )
        between = time.perf_counter()
        lowers = plan.lower(state_dicts, x, norm=norm, memory=memory, progress=False)
    seconds = {
        "upper": between - started,
        "lower": time.perf_counter() - between,
        "ops": sum(inside.values()),
    }
    return BatchBounds(uppers, lowers, seconds)


def _is_native(plan: Plan, norm: Norm) -> bool:
    """Whether all that takes long is in native ops: a chain of linear maps."""
    chain = fused_chain(plan, norm, torch.device("cpu"))
    return chain is not None and all(layer.convolution is None for layer in plan.layers)
