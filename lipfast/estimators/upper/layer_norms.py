"""Brackets of layers whose stored weight is not quite the true one.

Part of the proof of every upper bound. The native ops bracket the norm of the stored weight. What
BatchNorm is folded into, or what is computed from parameters, differs from it by roundings E, and
``| ||W + E|| - ||W|| | <= ||E||``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.upper.convolution_norms import NormBracket, holder, sums_of_kernels
from lipfast.graph.nodes import error_name
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched
from lipfast.plan.fold import fold_roundings, folded_name
from lipfast.plan.layers import Layer
from lipfast.plan.matrix_errors import frobenius_norm, frobenius_of_scaled
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rounding import UNDERFLOW, widened

# More roundings than a sum of 2^20 numbers and what is made of it have.
_MANY = 1 << 22
# Beside it where squares, or products with a bound of an error, may underflow.
_UNDERFLOW_OF_SQUARES = 2.0**-900

MatrixErrors = Callable[[], list[float]] | None
"""For each network what a stored weight is off by, in the norm; None: it is the true one."""

LayerErrors = Callable[[Sequence[float]], list[float]] | None
"""`MatrixErrors` of any layer, from the upper ends of the brackets of the stored weights."""


def error_of_weight(layer: Layer, tensors: Mapping[str, Tensor], weight: Tensor) -> Tensor | None:
    """What the entries of a stored weight may be off by, float64, rounded up; None: nothing.

    ``eps |W| + t`` of folding, and what computing it from parameters rounded.
    """
    error = tensors.get(error_name(layer.weight))
    if layer.folds:
        underflow = tensors[folded_name(layer.node, "underflow")].double()
        shape = (*underflow.shape, *[1] * (weight.dim() - underflow.dim()))
        folded = weight.double().abs() * fold_roundings(layer.folds) + underflow.reshape(shape)
        error = folded if error is None else error + folded
    return None if error is None else widened(error.double(), 4).expand_as(weight) + UNDERFLOW


def weights_with_errors(
    layer: Layer, networks: ResolvedNetworks, chosen: slice
) -> tuple[Tensor, Tensor | None]:
    """Matrices of some networks (networks, outputs, inputs) in float64, and their errors."""
    weights = networks.together(layer.weight)[chosen]
    names = [error_name(layer.weight), folded_name(layer.node, "underflow")]
    known = {name: tensor[chosen] for name, tensor in networks.tensors(names).items()}
    errors = None
    if layer.folds or names[0] in known:
        errors = error_of_weight(layer, known, weights)
    if layer.transposed:
        weights, errors = weights.mT, None if errors is None else errors.mT
    return weights.double(), errors


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
        underflow = float(tensors[folded_name(layer.node, "underflow")])
        error = _folding_error(layer, size, underflow, matrix)
    rounding = tensors.get(error_name(layer.weight))
    if rounding is not None:
        size = _norm_of_magnitudes(layer, rounding, norm)
        error += _computing_error(size)
    return error


def errors_of_matrices(layer: Layer, networks: ResolvedNetworks, norm: Norm) -> MatrixErrors:
    """`error_of_matrix` of many networks, when somebody asks; on a device they are on their way."""
    if layer.folds == 0 and not any(error_name(layer.weight) in entry for entry in networks):
        return None
    if networks[0][layer.weight].is_cpu:
        errors = [error_of_matrix(layer, entry[layer.weight], entry, norm) for entry in networks]
        return lambda: errors
    weights = networks.together(layer.weight)
    folded = _MagnitudesLater(layer, weights.double(), norm) if layer.folds else None
    names = [folded_name(layer.node, "underflow")] if layer.folds else []
    underflows = Fetched([networks.together(name) for name in names])
    computed = networks.tensors([error_name(layer.weight)]).get(error_name(layer.weight))
    rounded = None if computed is None else _MagnitudesLater(layer, computed, norm)

    def read() -> list[float]:
        errors = [0.0] * len(networks)
        if folded is not None:
            pairs = zip(folded.norms(), underflows.read()[0].tolist(), strict=True)
            errors = [_folding_error(layer, *pair, weights[0]) for pair in pairs]
        if rounded is not None:
            sizes = zip(errors, rounded.norms(), strict=True)
            errors = [error + _computing_error(size) for error, size in sizes]
        return errors

    return read


def errors_of_kernels(layer: Layer, networks: ResolvedNetworks, norm: Norm) -> LayerErrors:
    """``||E||`` of a convolution of many networks, from the upper ends of their brackets.

    E is what folding and what computing the kernel rounded. Norm 2 is bounded by `holder`; for
    norms 1 and inf the upper end for a kernel is that for ``|W|``, too.
    """
    computed = networks.tensors([error_name(layer.weight)]).get(error_name(layer.weight))
    if layer.folds == 0 and computed is None:
        return None
    weights = networks.together(layer.weight)
    norms: tuple[Norm, ...] = (1, math.inf) if norm == 2 else (norm,)

    def queued(kernels: Tensor | None) -> list[Callable[[], list[NormBracket]]]:
        return [] if kernels is None else [sums_of_kernels(layer, kernels, own) for own in norms]

    def sizes(sums: Sequence[Callable[[], list[NormBracket]]]) -> list[float]:
        brackets = [own() for own in sums]
        if norm == 2:
            return [holder(*pair) for pair in zip(*brackets, strict=True)]
        return [bracket.upper for bracket in brackets[0]]

    names = [folded_name(layer.node, "underflow")] if layer.folds else []
    underflows = Fetched([networks.together(name) for name in names])
    folded = queued(weights if layer.folds and norm == 2 else None)
    rounded = queued(computed)

    def read(uppers: Sequence[float]) -> list[float]:
        errors = [0.0] * len(networks)
        if layer.folds:
            known = sizes(folded) if folded else uppers
            pairs = zip(known, underflows.read()[0].tolist(), strict=True)
            errors = [_folding_error(layer, *pair, weights[0]) for pair in pairs]
        if rounded:
            pairs = zip(errors, sizes(rounded), strict=True)
            errors = [error + size for error, size in pairs]
        return errors

    return read


def _computing_error(size: float) -> float:
    return widened(size, _MANY) + _UNDERFLOW_OF_SQUARES


def _folding_error(layer: Layer, size: float, underflow: float, weight: Tensor) -> float:
    """``eps size + t m n``: no row or column of an operator holds an entry m + 1 times.

    m = 1, and 3 per axis of circular padding, which is at most an input's length on either side.
    """
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


def errors_of_layer(layer: Layer, networks: ResolvedNetworks, norm: Norm) -> LayerErrors:
    """For each network what a layer's stored weight is off by, when somebody asks."""
    if layer.convolution is not None:
        return errors_of_kernels(layer, networks, norm)
    errors = errors_of_matrices(layer, networks, norm)
    return None if errors is None else lambda _: errors()


class _MagnitudesLater:
    """`_norm_of_magnitudes` of many matrices (N, rows, columns), on its way from a device."""

    def __init__(self, layer: Layer, matrices: Tensor, norm: Norm) -> None:
        self._count = matrices[0].numel()
        self._euclidean = norm == 2
        magnitudes = matrices.abs()
        if not self._count:
            numbers = [magnitudes.new_zeros(len(matrices))]
        elif norm == 2:
            flat = magnitudes.flatten(1)
            peaks = flat.amax(1)
            scaled = flat / torch.where(peaks > 0, peaks, 1.0)[:, None]
            numbers = [peaks, scaled.square().sum(1).sqrt()]
        else:
            rows = math.isinf(norm) is not layer.transposed
            numbers = [magnitudes.sum(2 if rows else 1).amax(1)]
        self._read = Fetched(numbers)

    def norms(self) -> list[float]:
        """Rounded up."""
        first, *lengths = (numbers.tolist() for numbers in self._read.read())
        if lengths:
            pairs = zip(lengths[0], first, strict=True)
            return [frobenius_of_scaled(*pair, self._count) for pair in pairs]
        return first if self._euclidean else [widened(value, _MANY) for value in first]
