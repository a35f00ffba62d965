"""Norms 1 and inf of all Jacobians that ranges of slopes make of chains of affine maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.norms import AnyNorm, check_norm
from lipfast.ops._arguments import check_floating, native_dtype
from lipfast.ops.threads import native_op


class IntervalNorms(NamedTuple):
    """What is known of chains of maps.

    Attributes:
        norms: (networks,) float64: bounds of the norms of all Jacobians.
        sums: (networks, maps) float64: of the largest column (p = 1) or row of each weight's
            magnitudes, as computed: of one map alone it is what `norms` is for all.
    """

    norms: Tensor
    sums: Tensor


def chain_interval_jacobian(
    weights: Sequence[Sequence[Tensor]],
    lower: Sequence[Tensor | None],
    upper: Sequence[Tensor | None],
    *,
    norm: AnyNorm,
    errors: Sequence[Sequence[Tensor | None]] | None = None,
) -> IntervalNorms:
    r"""Bounds of $\|D_L W_L \cdots D_1 W_1 D_0\|_p$ over all diagonals between two given ones.

    From the last map to the first every entry of the product is an interval (its middle and its
    radius): slopes make the hull of the interval times both ends, $W$ adds in proportion, two
    products of matrices per map. The bound is the largest sum of the largest magnitudes in a row
    (p = inf) or a column (p = 1). Side: upper, certified: every rounding is covered
    (`docs/bounds.md`). Never above the product of norms by more than roundings.

    Args:
        weights: per network, the maps in the order of evaluation, (out, in) each; float16,
            bfloat16, float32 or float64, on the CPU. All networks alike in shapes.
        lower: least slopes, before the first map and behind each: (units,), or (networks, units);
            None where nothing lies between.
        upper: largest slopes, alike.
        norm: 1 or inf.
        errors: per network and map, how far its entries may be from the true ones, or None.

    Returns:
        An `IntervalNorms`; inf where a number on the way is not finite.

    Raises:
        ArgumentError: another norm, dtype or shape; the message names the entry.

    Example:
        >>> import torch
        >>> weights = [[torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -1.0]])]]
        >>> zero, one = torch.zeros(2), torch.ones(2)
        >>> found = chain_interval_jacobian(
        ...     weights, [None, zero, None], [None, one, None], norm=1
        ... )
        >>> found.norms.round(), found.sums
        (tensor([1.], dtype=torch.float64), tensor([[2., 1.]], dtype=torch.float64))
    """
    p = check_norm(norm)
    if p == 2:
        raise ArgumentError("norm must be 1 or inf for an interval Jacobian, not 2")
    if not weights or not weights[0]:
        raise ArgumentError("weights: expected at least one network with at least one map")
    maps = len(weights[0])
    if any(len(own) != maps for own in weights) or not len(lower) == len(upper) == maps + 1:
        raise ArgumentError(
            f"expected {maps} maps of every network and {maps + 1} ranges of slopes, got "
            f"{[len(own) for own in weights]} and {len(lower)}, {len(upper)}"
        )
    flat = [
        native_dtype(check_floating(weight, f"network {network}, map {index}", 2).detach())
        for network, own in enumerate(weights)
        for index, weight in enumerate(own)
    ]
    nothing = torch.empty(0, dtype=torch.float64, device="cpu")
    wrong: list[Tensor] = []
    if errors is not None and any(error is not None for own in errors for error in own):
        wrong = [nothing if e is None else _double(e) for own in errors for e in own]
    ends = [
        [nothing if end is None else _row_of_slopes(_double(end)) for end in side]
        for side in (lower, upper)
    ]
    try:
        with native_op():
            found = torch.ops.lipfast.chain_interval_jacobian(
                flat, wrong, ends[0], ends[1], 1 if p == 1 else 0
            )
    except RuntimeError as error:
        raise ArgumentError(str(error).splitlines()[0]) from error
    return IntervalNorms(*found)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().contiguous()


def _row_of_slopes(slopes: Tensor) -> Tensor:
    """Those of all networks alike as one row."""
    return slopes[None] if slopes.dim() == 1 else slopes


@torch.library.register_fake("lipfast::chain_interval_jacobian")
def _chain_interval_jacobian_fake(
    weights: Sequence[Tensor],
    errors: Sequence[Tensor],
    lower: Sequence[Tensor],
    upper: Sequence[Tensor],
    norm: int,
) -> tuple[Tensor, Tensor]:
    maps = len(lower) - 1
    sums = weights[0].new_empty(len(weights) // maps, maps, dtype=torch.float64)
    return sums.new_empty(len(sums)), sums
