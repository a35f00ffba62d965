"""Differences between two evaluations of one function: rounding, or something else.

See docs/bounds.md for how the two are told apart.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Units in the last place of the largest output within which two evaluations are the same.
_ALIKE = 8
# Rounding shrinks by 2^-29 from float32 to float64, a mixture not at all: half way between them.
_SHRINKS = 2.0**-15
_MASK = 1e8
# Functions whose results are exact in any dtype.
_EXACT = ("zeros", "ones", "empty", "eye", "new_zeros", "new_ones", "new_empty")
# Parameters that are copied to another precision: a check should not take more than its model.
LARGEST_COPY = 1 << 26
# Evaluations where random numbers are drawn: a mask that drops one in a hundred often drops none.
REPEATS = 50
# The largest difference in each row that was compared, and the largest magnitude.
Gaps = tuple[Tensor, Tensor]


def gaps_between(first: Tensor, second: Tensor) -> Gaps:
    """What is NaN or the same infinity in both is alike; else the difference is infinite."""
    first, second = first.double(), second.double()
    alike = (first == second) | (first.isnan() & second.isnan())
    gaps = torch.where(alike, 0, first - second).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    return gaps.amax(1), torch.maximum(_magnitudes(first), _magnitudes(second)).amax(1)


def _magnitudes(values: Tensor) -> Tensor:
    return values.abs().nan_to_num(nan=0.0, posinf=0.0)


def are_alike(gaps: Gaps, dtype: torch.dtype) -> bool:
    """Whether the differences are a few units in the last place of the largest magnitude."""
    return bool((gaps[0] <= _ALIKE * torch.finfo(dtype).eps * gaps[1]).all())


def beyond_rounding(single: Gaps, double: Gaps) -> float | None:
    """The largest difference in float64 that did not shrink as rounding does; None without any.

    Args:
        single: in float32, or in shorter numbers.
        double: of the same evaluations in float64.
    """
    # Where digits cancel, float32 has so few numbers that a row may show no difference by chance.
    relative = _magnitudes(single[0] / single[1]).amax().clamp_min(torch.finfo(torch.float32).eps)
    return worst(double[0], _SHRINKS * torch.maximum(_magnitudes(single[0]), relative * double[1]))


def beyond_half_of_the_digits(gaps: Gaps, eps: float) -> float | None:
    """The largest difference in more than half of the digits; None without any.

    Nothing tells rounding to short numbers from a small difference of functions.

    Args:
        gaps: in one precision; there is no other.
        eps: of the shortest numbers inside.
    """
    return worst(gaps[0], math.sqrt(eps) * gaps[1])


def worst(gaps: Tensor, room: Tensor) -> float | None:
    """The largest difference that does not fit into its room; None if all do."""
    beyond = gaps > room
    return float(gaps[beyond].max()) if bool(beyond.any()) else None


class Roundings(TorchFunctionMode):
    """Notes what decides how large the rounding errors of a function are.

    (A mode below autograd would see more, and would import a second's worth of torch's compiler.)

    Attributes:
        eps: the distance from 1 to the next number of the shortest dtype that the function converts
            numbers to, or computes with; also what it makes of integers, such as tables of
            positions, if `tables` is set.
        largest: the largest magnitude of any result, if it was asked for. Numbers above 1e8 are not
            counted: they are masks.
    """

    def __init__(self, dtype: torch.dtype, *, sizes: bool = False, tables: bool = False) -> None:
        super().__init__()
        self.eps = torch.finfo(dtype).eps
        self.largest = 0.0
        self._sizes, self._tables = sizes, tables

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found = _floats(result)
        if found:
            made = self._tables and func.__name__ not in _EXACT
            given = min(map(_eps, _floats(args)), default=0.0 if made else 1.0)
            self.eps = max([self.eps, *(eps for eps in map(_eps, found) if eps > given)])
        for value in found if self._sizes else ():
            # Numbers of sparse tensors, and those inside torch.func's transforms, are not shown.
            with contextlib.suppress(RuntimeError):
                counted = value.detach().abs()
                counted = counted[counted < _MASK]
                self.largest = max(self.largest, float(counted.max()) if counted.numel() else 0.0)
        return result


def _floats(values: Any) -> list[Tensor]:
    leaves = (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
    return [value for value in leaves if value.is_floating_point() or value.is_complex()]


def _eps(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps
