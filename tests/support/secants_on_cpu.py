"""The ops of secants that have kernels for CUDA alone, on the CPU: from those that it has.

For devices in pretence. Points and quotients are those of `lipfast.estimators.lower`, in torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipfast.estimators.lower.points import points_around
from lipfast.estimators.lower.quotients import differences, quotients
from lipfast.norms import Norm

_NORMS: dict[int, Norm] = {0: math.inf, 1: 1, 2: 2}


@dataclass(frozen=True)
class _Chains:
    """What `points_around` asks of networks: the native ops with what they are given."""

    arguments: tuple[Any, ...]

    def jacobians(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.lipfast.chain_secants_jacobians(x, *self.arguments)
        return found

    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        reach = torch.ops.lipfast.chain_secants_kinks(x, direction.contiguous(), *self.arguments)
        return reach[:, 0], reach[:, 1]


def _points(x: Tensor, *arguments: Any) -> Tensor:
    *chains, norm, _fractions, _ladder, _longest = arguments
    return points_around(_Chains(tuple(chains)), x, _NORMS[norm])[0]  # type: ignore[arg-type]


def _quotients(points: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *chains, norm, tight = arguments
    outputs, errors = torch.ops.lipfast.chain_secants_enclosures(points, *chains)
    lows = range(1, points.shape[1], 2)
    pairs = [pair for low in lows for pair in ((low, low + 1), (0, low + 1), (low, 0))]
    first, second = torch.tensor(pairs).unbind(1)
    moved = differences(points, outputs, (first, second), _NORMS[norm])
    values, promised = (
        quotients(*moved, own, (first, second), _NORMS[norm])
        for own in (errors, torch.zeros_like(errors))
    )
    best, rows = values.argmax(1), torch.arange(len(points))
    found = values[rows, best]
    loose = (found < tight * promised.amax(1)).double()
    ends = torch.stack([points[rows, side[best]] for side in (first, second)], 1)
    return torch.stack([found, loose], 1), ends


for _name, _function in (
    ("chain_secants_points", _points),
    ("chain_secants_quotients", _quotients),
):
    # Pytest may import this file twice.
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"lipfast::{_name}", "CPU"):
        torch.library.impl(f"lipfast::{_name}", "CPU")(_function)
