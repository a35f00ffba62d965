"""Proved brackets of the norms 1 and inf of matrices: sums of magnitudes."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched
from lipfast.ops.stack import stacked
from lipfast.rounding import UNIT_ROUNDOFF


def sum_norms(
    matrices: Sequence[Tensor], names: Sequence[str], norm: Norm
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Largest column (1) or row (inf) sums of magnitudes, rounded outward, and where they are.

    Args:
        matrices: of any shapes; the bounds carry their gradients.
        names: what errors call them.
        norm: 1 or inf.

    Returns:
        Lower and upper bounds, and for each matrix the unit vector whose image is the largest and
        the image's direction, all in float64.

    Raises:
        NonFiniteError: a matrix holds NaN or Inf.
    """
    lower, upper, right, left = [], [], [], []
    for name, matrix in zip(names, matrices, strict=True):
        sums = matrix.double().abs().sum(dim=0 if norm == 1 else 1)
        top = int(sums.detach().argmax())
        value = sums[top]
        if not bool(torch.isfinite(value)) and not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{name}: holds NaN or Inf; its norm is not defined")
        # A sum that overflows is finite all the same: about the largest float64 at least.
        slack = slack_of_sum(matrix.numel() // sums.numel())
        lower.append(value.clamp(max=sys.float_info.max) / slack)
        upper.append(value * slack)
        vector, image = _extremal(matrix.detach(), norm, top)
        right.append(vector)
        left.append(image)
    return torch.stack(lower), torch.stack(upper), right, left


def _extremal(matrix: Tensor, norm: Norm, top: int) -> tuple[Tensor, Tensor]:
    """The unit vector whose image is the largest, and the image's direction."""
    if norm == 1:
        vector = torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
        vector[top] = 1.0
    else:
        vector = torch.where(matrix[top] < 0, -1.0, 1.0).double() / math.sqrt(matrix.shape[1])
    image = matrix.double() @ vector
    size = float(image.norm())
    return vector, image / size if 0 < size < math.inf else image


def sums_on_device(
    matrices: Sequence[Tensor], names: Sequence[str], norm: Norm
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[list[float]]]:
    """What `sum_norms` gives, by few kernels for each shape and with one wait for the device.

    Also returns lower and upper bounds, ones and ones on the host: codes and passes.
    """
    shapes: dict[tuple[torch.Size, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        shapes.setdefault((matrix.shape, matrix.dtype), []).append(index)
    order = [index for indices in shapes.values() for index in indices]
    places = {index: place for place, index in enumerate(order)}
    back = [places[index] for index in range(len(matrices))]
    parts = [
        _largest_sums(torch.stack([matrices[index] for index in indices]), norm)
        for indices in shapes.values()
    ]
    fields = torch.cat([part[0] for part in parts], 1)
    if len(shapes) > 1:
        fields = fields[:, torch.tensor(back, device=fields.device)]
    lower, upper, finite = fields.detach().tolist()
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(f"{name}: holds NaN or Inf; its norm is not defined")
    rights, lefts = ([v for part in parts for v in part[side].unbind()] for side in (1, 2))
    right, left = [rights[place] for place in back], [lefts[place] for place in back]
    ones = [1.0] * len(matrices)
    return fields[0], fields[1], right, left, [lower, upper, ones, ones]


class SumsLater:
    """Norms 1 or inf of matrices on a device, on their way from it.

    Args:
        groups: finite matrices, those of a group of one shape.
        norm: 1 or inf.
        memory: bytes that copies may take.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], norm: Norm, memory: int) -> None:
        self._groups, largest = groups, []
        self._terms = [group[0].shape[0 if norm == 1 else 1] for group in groups]
        for group in groups:
            # In float64, and perhaps put together.
            count = max(1, memory // ((8 + group[0].itemsize) * group[0].numel()))
            for first in range(0, len(group), count):
                wide = stacked(group[first : first + count]).double()
                sums = torch.linalg.vector_norm(wide, 1, dim=1 if norm == 1 else 2)
                largest.append(sums.amax(1))
        self._read = Fetched(largest)

    def bounds(self) -> tuple[list[list[float]], list[list[float]]]:
        """Lower and upper bounds, for each group.

        Raises:
            NonFiniteError: a matrix holds NaN or Inf.
        """
        values = torch.split(torch.cat(self._read.read()), [len(group) for group in self._groups])
        lower, upper = [], []
        for own, group, terms in zip(values, self._groups, self._terms, strict=True):
            # A sum of finite numbers may overflow, so only then is there a second look.
            for value, matrix in zip(own.tolist(), group, strict=True):
                if not math.isfinite(value) and not bool(matrix.isfinite().all()):
                    raise NonFiniteError("a matrix holds NaN or Inf; its norm is not defined")
            lower.append((own.clamp(max=sys.float_info.max) / slack_of_sum(terms)).tolist())
            upper.append((own * slack_of_sum(terms)).tolist())
        return lower, upper


def slack_of_sum(terms: int) -> float:
    """What rounding makes of a sum of so many non-negative numbers, in any order: gamma_{n-1}."""
    return 1.0 + 2.0 * terms * UNIT_ROUNDOFF if terms > 1 else 1.0


def _largest_sums(stacked: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper bounds of matrices (n, rows, cols) and whether finite, (3, n); vectors."""
    wide = stacked.double()
    sums = wide.abs().sum(1 if norm == 1 else 2)
    top = sums.detach().argmax(1, keepdim=True)
    value = sums.gather(1, top)[:, 0]
    slack = slack_of_sum(wide[0].numel() // sums.shape[1])
    wide = wide.detach()
    finite = torch.isfinite(value.detach()) | torch.isfinite(wide).flatten(1).all(1)
    sides = value.clamp(max=sys.float_info.max) / slack, value * slack, finite.double()
    if norm == 1:
        right = torch.zeros_like(wide[:, 0]).scatter_(1, top, 1.0)
    else:
        row = wide.take_along_dim(top[:, :, None], 1)[:, 0]
        right = torch.where(row < 0, -1.0, 1.0).double() / math.sqrt(row.shape[1])
    image = (wide @ right[:, :, None])[:, :, 0]
    size = image.norm(dim=1, keepdim=True)
    left = torch.where((size > 0) & torch.isfinite(size), image / size, image)
    return torch.stack(sides), right, left
