"""Brackets of layers whose stored weight is not quite the true one.

Part of the proof of every upper bound. The native ops bracket the norm of the stored weight. What
BatchNorm is folded into, or what is computed from parameters, differs from it by roundings E, and
``| ||W + E|| - ||W|| | <= ||E||``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.upper.convolution_norms import convolution_brackets, holder_bound
from lipfast.graph.nodes import error_name
from lipfast.norms import Norm
from lipfast.plan.fold import fold_roundings, folded_name
from lipfast.plan.layers import Layer
from lipfast.plan.matrix_errors import frobenius_norm, frobenius_of_scaled
from lipfast.rounding import widened

# More roundings than a sum of 2^20 numbers and what is made of it have.
_MANY = 1 << 22
# Beside it where squares, or products with a bound of an error, may underflow.
_UNDERFLOW_OF_SQUARES = 2.0**-900


def error_of_matrix(
    layer: Layer, matrix: Tensor, tensors: Mapping[str, Tensor], norm: Norm
) -> float:
    """``||E||`` of a matrix: what folding and what computing it from parameters rounded.

    Folding: ``|E| <= eps |W| + t`` with a number t, so ``||E||_2 <= eps ||W||_F + t n`` over n
    entries, and ``||E||_p <= eps || |W| ||_p + t n``. Computing: ``|E|`` is known elementwise, and
    its norm is taken, the Frobenius norm for 2.
    """
    error = 0.0
    if layer.folds:
        size = _norm_of_magnitudes(layer, matrix.double(), norm)
        error = _error_of_folding(layer, size, matrix, tensors)
    rounding = tensors.get(error_name(layer.weight))
    if rounding is not None:
        size = _norm_of_magnitudes(layer, rounding, norm)
        error += widened(size, _MANY) + _UNDERFLOW_OF_SQUARES
    return error


def errors_of_matrices(
    layer: Layer,
    matrices: Sequence[Tensor],
    tensors: Sequence[Mapping[str, Tensor]],
    norm: Norm,
) -> list[float]:
    """`error_of_matrix` of many networks; of folded ones on a device with one wait for it."""
    rounding = any(error_name(layer.weight) in entry for entry in tensors)
    if rounding or norm != 2 or matrices[0].is_cpu or not matrices[0].numel():
        pairs = zip(matrices, tensors, strict=True)
        return [error_of_matrix(layer, *pair, norm) for pair in pairs]
    stacked = torch.stack([matrix.double() for matrix in matrices]).flatten(1)
    peaks = stacked.abs().amax(1)
    scaled = stacked / torch.where(peaks > 0, peaks, 1.0)[:, None]
    lengths = scaled.square().sum(1).sqrt()
    name = folded_name(layer.node, "underflow")
    underflows = torch.stack([entry[name] for entry in tensors])
    errors = []
    for peak, length, underflow in torch.stack([peaks, lengths, underflows], 1).tolist():
        size = frobenius_of_scaled(length, peak, stacked.shape[1])
        errors.append(_folding_error(layer, size, underflow, matrices[0]))
    return errors


def error_of_kernel(
    layer: Layer, weight: Tensor, tensors: Mapping[str, Tensor], norm: Norm, upper: float
) -> float:
    """``||E||`` of a convolution with a kernel; norm 2 by `holder_bound`.

    Args:
        layer: the convolution.
        weight: its kernel.
        tensors: parameters with the bounds of their errors.
        norm: 1, 2 or inf.
        upper: end of the bracket for `weight`; for norms 1 and inf it is that of ``|W|``, too.
    """
    error = 0.0
    if layer.folds:
        size = holder_bound(layer, weight) if norm == 2 else upper
        error = _error_of_folding(layer, size, weight, tensors)
    rounding = tensors.get(error_name(layer.weight))
    if rounding is not None:
        size = holder_bound(layer, rounding)
        if norm != 2:
            size = convolution_brackets([layer], [rounding], norm)[0].upper
        error += size
    return error


def _error_of_folding(
    layer: Layer, size: float, weight: Tensor, tensors: Mapping[str, Tensor]
) -> float:
    """``eps size + t m n``: no row or column of an operator holds an entry m + 1 times.

    m = 1, and 3 per axis of circular padding, which is at most an input's length on either side.
    """
    underflow = float(tensors[folded_name(layer.node, "underflow")])
    return _folding_error(layer, size, underflow, weight)


def _folding_error(layer: Layer, size: float, underflow: float, weight: Tensor) -> float:
    circular = layer.convolution is not None and layer.convolution.circular
    often = 3 ** (weight.dim() - 2) if circular else 1
    room = underflow * weight.numel() * often
    return fold_roundings(layer.folds) * size + widened(room, 1 << 12)


def _norm_of_magnitudes(layer: Layer, matrix: Tensor, norm: Norm) -> float:
    """``|| |M| ||`` of a layer's operator, rounded up; the Frobenius norm for 2."""
    if norm == 2:
        return frobenius_norm(matrix)
    rows = math.isinf(norm) is not layer.transposed  # whether sums run along the rows
    sums = matrix.abs().sum(-1 if rows else 0)
    return widened(float(sums.max()), _MANY) if sums.numel() else 0.0
