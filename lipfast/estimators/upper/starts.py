"""Vectors to start from: what one call found for a layer, to begin with at similar weights.

No part of a proof: a start decides how soon an estimate is found, never whether a bound holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.conv_norms import ConvStart
from lipfast.plan.architecture import Architecture

StartVectors = Mapping[str, Tensor | ConvStart]
"""Name of a layer's weight -> right singular vector (columns,), or a convolution's start."""
Starts = StartVectors | Sequence[StartVectors | None] | None


def checked_starts(plan: Architecture, start: Starts, count: int) -> list[StartVectors]:
    """One mapping per state dict, perhaps empty; names checked, shapes are the op's to check.

    Raises:
        ArgumentError: a name is not that of a layer's weight, or there are more or fewer mappings.
    """
    if start is None or isinstance(start, Mapping):
        starts: list[StartVectors] = [start or {}] * count
    else:
        entries = start if isinstance(start, Sequence) else [start]
        wrong = [entry for entry in entries if not isinstance(entry, (Mapping, type(None)))]
        if wrong:
            raise ArgumentError(
                "start must be a mapping from names of weights to vectors (Tracker.vectors), or a "
                f"list of them, not of {type(wrong[0]).__name__}"
            )
        starts = [entry or {} for entry in entries]
    if len(starts) != count:
        raise ArgumentError(f"start: {len(starts)} mappings for {count} state dicts")
    if not any(starts):
        return starts
    names = {layer.parameter for layer in plan.layers}
    if plan.folded.merged:
        names |= {layer.parameter for layer in plan.layers_of(plan.unmerged)}
    for entry in starts:
        unknown = [name for name in entry if name not in names]
        if unknown:
            raise ArgumentError(
                f"start: '{unknown[0]}' is not the weight of a layer; those are "
                f"{', '.join(sorted(names))}"
            )
    return starts


def start_of_matrix(start: StartVectors, name: str) -> Tensor | None:
    """The start vector of a matrix.

    Raises:
        ArgumentError: it is a convolution's.
    """
    entry = start.get(name)
    if entry is not None and not isinstance(entry, Tensor):
        raise ArgumentError(f"start: '{name}' is a matrix: expected a vector, got a convolution's")
    return entry
