"""Few native calls for all layers of all networks, whatever the number of either.

No part of a proof: what is proved of each layer is in the ops and in `layer_norms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.convolution_norms import convolution_brackets
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.layer_norms import bracket_of, error_of_kernel, error_of_matrix
from lipfast.estimators.upper.starts import StartVectors, start_of_matrix
from lipfast.norms import Norm, dual_norm
from lipfast.ops.conv_norms import ConvStart
from lipfast.ops.spectral_norms import spectral_norms
from lipfast.plan.layers import Layer

_Found = tuple[int, Layer, LayerBracket, Tensor | ConvStart | None]
"""Network, layer, its bracket, and what to start from at similar weights."""


class LayerCall(NamedTuple):
    """All layers of some networks of one architecture.

    Attributes:
        layers: of the architecture.
        tensors: parameters of each network.
        norm: 1, 2 or inf.
        rtol: relative gap of each bracket.
        seed: of the start vectors.
        start: what each network starts from, by the name of the weight.
    """

    layers: Sequence[Layer]
    tensors: Sequence[Mapping[str, Tensor]]
    norm: Norm
    rtol: float
    seed: int
    start: Sequence[StartVectors]


def layer_brackets(call: LayerCall) -> tuple[list[tuple[LayerBracket, ...]], list[StartVectors]]:
    """Brackets of all layers of all networks.

    Also what to start from at similar weights, for each network by the name of the weight.
    """
    found: dict[tuple[int, int], LayerBracket] = {}
    vectors: list[dict[str, Tensor | ConvStart]] = [{} for _ in call.tensors]
    for part in (_matrix_brackets, _kernel_brackets):
        for network, layer, bracket, right in part(call):
            found[network, layer.index] = bracket
            if right is not None:
                vectors[network][layer.parameter] = right
    brackets = [
        tuple(found[network, layer.index] for layer in call.layers)
        for network in range(len(call.tensors))
    ]
    return brackets, list(vectors)


def _matrix_brackets(call: LayerCall) -> Iterator[_Found]:
    layers, tensors, norm, rtol, seed, start = call
    for transposed in (False, True):
        chosen = [
            layer
            for layer in layers
            if layer.convolution is None and (layer.transposed and norm != 2) is transposed
        ]
        matrices = [_native_dtype(entry[layer.weight]) for entry in tensors for layer in chosen]
        if not matrices:
            continue
        effective = dual_norm(norm) if transposed else norm
        starts = None
        if any(start):
            names = [layer.parameter for layer in chosen]
            starts = [start_of_matrix(entry, name) for entry in start for name in names]
        result = spectral_norms(matrices, norm=effective, rtol=rtol, seed=seed, start=starts)
        fields = (result.lower, result.upper, result.certified, result.passes)
        columns = zip(*(field.tolist() for field in fields), strict=True)
        for position, values in enumerate(columns):
            network, layer = position // len(chosen), chosen[position % len(chosen)]
            error = error_of_matrix(layer, matrices[position], tensors[network], norm)
            bracket = bracket_of(layer, values, result.method[position], error)
            yield network, layer, bracket, result.right[position] if norm == 2 else None


def _kernel_brackets(call: LayerCall) -> Iterator[_Found]:
    layers, tensors, norm, rtol, seed, start = call
    kernels = [layer for layer in layers if layer.convolution is not None]
    chosen = [(network, layer) for network in range(len(tensors)) for layer in kernels]
    weights = [tensors[network][layer.weight] for network, layer in chosen]
    starts = [start[network].get(layer.parameter) for network, layer in chosen]
    own = [layer for _, layer in chosen]
    results = convolution_brackets(own, weights, norm, rtol=rtol, seed=seed, start=starts)
    for (network, layer), weight, result in zip(chosen, weights, results, strict=True):
        error = error_of_kernel(layer, weight, tensors[network], norm, result.upper)
        values = (result.lower, result.upper, result.certified, result.passes)
        yield network, layer, bracket_of(layer, values, result.method, error), result.start


def _native_dtype(weight: Tensor) -> Tensor:
    """Give the weight a dtype of the native op: half precision and integers widen exactly."""
    weight = weight.detach()
    if not weight.is_floating_point():
        return weight.double()
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
