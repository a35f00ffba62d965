"""Few native calls for all layers of all networks, whatever the number of either.

No part of a proof: what is proved of each layer is in the ops and in `layer_norms`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipfast.estimators.upper.convolution_norms import convolution_brackets
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.layer_norms import error_of_kernel, errors_of_matrices
from lipfast.estimators.upper.starts import StartVectors, start_of_matrix
from lipfast.graph.nodes import error_name
from lipfast.norms import Norm, dual_norm
from lipfast.ops.conv_norms import ConvStart
from lipfast.ops.spectral_norms import SpectralNorms, spectral_norms
from lipfast.plan.layers import Layer

_FIELDS = ("lower", "upper", "certified", "passes")


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


class FoundStarts(Sequence[StartVectors]):
    """What to start from at similar weights: for each network by the name of the weight.

    Put together where somebody asks; most never do.
    """

    def __init__(self, networks: int) -> None:
        self._networks = networks
        # Layer -> what it starts from, of a network.
        self._found: dict[str, Callable[[int], Tensor | ConvStart | None]] = {}

    def add(self, parameter: str, found: Callable[[int], Tensor | ConvStart | None]) -> None:
        """Note a layer's."""
        self._found[parameter] = found

    @overload
    def __getitem__(self, network: int) -> StartVectors: ...
    @overload
    def __getitem__(self, network: slice) -> Sequence[StartVectors]: ...
    def __getitem__(self, network: int | slice) -> StartVectors | Sequence[StartVectors]:
        if isinstance(network, slice):
            return [self[index] for index in range(*network.indices(self._networks))]
        if not -self._networks <= network < self._networks:
            raise IndexError(network)
        found = {name: start(network % self._networks) for name, start in self._found.items()}
        return {name: start for name, start in found.items() if start is not None}

    def __len__(self) -> int:
        return self._networks


def layer_brackets(call: LayerCall) -> tuple[LayerBrackets, FoundStarts]:
    """Brackets of all layers of all networks, and what to start from at similar weights."""
    starts = FoundStarts(len(call.tensors))
    matrices = [layer for layer in call.layers if layer.convolution is None]
    kernels = [layer for layer in call.layers if layer.convolution is not None]
    turned = [layer for layer in matrices if layer.transposed and call.norm != 2]
    if matrices and not turned and not kernels:
        return _matrix_brackets(call, matrices, call.norm, starts), starts
    found = LayerBrackets.empty(call.layers, len(call.tensors))
    plain = [layer for layer in matrices if layer not in turned]
    for chosen, norm in ((plain, call.norm), (turned, dual_norm(call.norm))):
        if chosen:
            found.put(_matrix_brackets(call, chosen, norm, starts))
    if kernels:
        found.put(_kernel_brackets(call, kernels, starts))
    return found, starts


def _matrix_brackets(
    call: LayerCall, chosen: Sequence[Layer], norm: Norm, starts: FoundStarts
) -> LayerBrackets:
    """Brackets of some layers, which are matrices, in this norm of the stored ones."""
    _, tensors, _, rtol, seed, start = call
    matrices = [_native_dtype(entry[layer.weight]) for entry in tensors for layer in chosen]
    begin = None
    if any(start):
        names = [layer.parameter for layer in chosen]
        begin = [start_of_matrix(entry, name) for entry in start for name in names]
    result = spectral_norms(matrices, norm=norm, rtol=rtol, seed=seed, start=begin)
    lower, upper, certified, passes = _on_the_host(result)
    fields = (lower, upper, certified.astype(bool), passes.astype(np.int64))
    found = LayerBrackets.of_all(chosen, *fields, np.array(result.method, dtype=object))
    for position, layer in enumerate(chosen):
        if layer.folds or any(error_name(layer.weight) in entry for entry in tensors):
            own = matrices[position :: len(chosen)]
            found.widen(position, errors_of_matrices(layer, own, tensors, call.norm))
        if norm == 2:
            starts.add(layer.parameter, partial(_start_of, result, len(chosen), position))
    return found


def _start_of(
    result: SpectralNorms[Any], layers: int, position: int, network: int
) -> Tensor | None:
    vector: Tensor = result.right[network * layers + position]
    return vector


def _on_the_host(result: SpectralNorms[Any]) -> list[npt.NDArray[Any]]:
    """Lower and upper bounds, whether certified, and passes."""
    if result._known is not None:
        return [np.array(column) for column in result._known]
    return [f.numpy() for f in (result.lower, result.upper, result.certified, result.passes)]


def _kernel_brackets(
    call: LayerCall, kernels: Sequence[Layer], starts: FoundStarts
) -> LayerBrackets:
    """Brackets of the layers that are convolutions."""
    _, tensors, norm, rtol, seed, start = call
    chosen = [(network, layer) for network in range(len(tensors)) for layer in kernels]
    weights = [tensors[network][layer.weight] for network, layer in chosen]
    begin = [start[network].get(layer.parameter) for network, layer in chosen]
    own = [layer for _, layer in chosen]
    results = convolution_brackets(own, weights, norm, rtol=rtol, seed=seed, start=begin)
    found = LayerBrackets.of_all(
        kernels,
        *(np.array([getattr(result, name) for result in results]) for name in _FIELDS),
        np.array([result.method for result in results], dtype=object),
    )
    for position, layer in enumerate(kernels):
        pairs = [
            (weights[network * len(kernels) + position], tensors[network], upper)
            for network, upper in enumerate(found.upper[:, position].tolist())
        ]
        errors = [
            error_of_kernel(layer, weight, entry, norm, upper) for weight, entry, upper in pairs
        ]
        found.widen(position, errors)
        own_starts = [result.start for result in results[position :: len(kernels)]]
        starts.add(layer.parameter, own_starts.__getitem__)
    return found


def _native_dtype(weight: Tensor) -> Tensor:
    """Give the weight a dtype of the native op: half precision and integers widen exactly."""
    if weight.requires_grad:
        weight = weight.detach()
    if weight.dtype in (torch.float32, torch.float64):
        return weight
    return weight.float() if weight.is_floating_point() else weight.double()
