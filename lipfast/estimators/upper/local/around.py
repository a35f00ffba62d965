"""A domain around its centre: how far linear functions of the inputs get on it.

Part of the proof of ranges: everything is rounded up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.domain import Box, Domain
from lipfast.plan.architecture import Architecture
from lipfast.rounding import UNDERFLOW, widened

# More than what squares below the range of float64 add to a length.
_VANISHED = 2.0**-500


class AroundCentre(NamedTuple):
    """All inputs, flattened and joined, at a distance from the centre that is bounded.

    Attributes:
        centre: of each input, (*shape).
        radii: of a box, for every entry; of a ball its radius for all.
        ball: whether the Euclidean distance of all entries together is bounded as well.
    """

    centre: list[Tensor]
    radii: Tensor
    ball: bool

    def reach(self, rows: Tensor) -> Tensor:
        """The largest ``|row (x - c)|`` on the domain, for rows (K, entries)."""
        if not self.ball:
            total: Tensor = rows.abs() @ self.radii
            return widened(total, rows.shape[1] + 8) + UNDERFLOW * rows.shape[1]
        return widened(lengths(rows) * self.radii[:1], 4) + UNDERFLOW


def lengths(rows: Tensor) -> Tensor:
    """Euclidean lengths (K,) of rows (K, entries), rounded up."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return widened(length, rows.shape[1] + 8) + _VANISHED


def around_centre(plan: Architecture, domain: Domain) -> AroundCentre:
    """A domain for the inputs of an architecture."""
    centre = [domain.middle(shape).cpu() for shape in plan.input_shapes]
    if isinstance(domain, Box):
        flat = domain.flattened(plan.input_shapes)
        low, high = (torch.as_tensor(end).cpu() for end in (flat.low, flat.high))
        middle = torch.cat([own.reshape(-1) for own in centre])
        # Differences have one rounding; where they are denormal none.
        radii = torch.maximum(high - middle, middle - low) * (1.0 + 2.0**-51)
        return AroundCentre(centre, radii, False)
    entries = sum(own.numel() for own in centre)
    radii = torch.full((entries,), float(domain.radius), dtype=torch.float64)
    return AroundCentre(centre, radii, True)
