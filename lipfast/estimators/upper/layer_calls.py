"""Few native calls for all layers of all networks, whatever the number of either.

No part of a proof: what is proved of each layer is in the ops and in `layer_norms`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipfast.estimators.upper.convolution_norms import (
    NormBracket,
    brackets_later,
    check_start,
    convolution_brackets,
    is_matrix,
    operator_of,
    sums_of_kernels,
)
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.layer_norms import errors_of_layer
from lipfast.estimators.upper.starts import StartVectors, start_of_matrix
from lipfast.norms import Norm, dual_norm
from lipfast.ops._sum_norms import SumsLater
from lipfast.ops.conv_norms import ConvStart
from lipfast.ops.spectral_norms import DEFAULT_MEMORY, SpectralNorms, spectral_norms
from lipfast.plan.layers import Layer
from lipfast.plan.stacked import ResolvedNetworks

_FIELDS = ("lower", "upper", "certified", "passes")


_Queued = Callable[[], LayerBrackets]
"""Reads brackets, which may be on their way from a device."""


class LayerCall(NamedTuple):
    """All layers of some networks of one architecture.

    Attributes:
        layers: of the architecture.
        networks: with their parameters.
        norm: 1, 2 or inf.
        rtol: relative gap of each bracket.
        seed: of the start vectors.
        start: what each network starts from, by the name of the weight.
    """

    layers: Sequence[Layer]
    networks: ResolvedNetworks
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
    """Brackets of all layers of all networks, and what to start from at similar weights.

    Of networks on a device everything is queued before anything is read.
    """
    starts = FoundStarts(len(call.networks))
    matrices = [layer for layer in call.layers if layer.convolution is None]
    kernels = [layer for layer in call.layers if layer.convolution is not None]
    turned = [layer for layer in matrices if layer.transposed and call.norm != 2]
    plain = [layer for layer in matrices if layer not in turned]
    flat = _kernels_of_one_tap(call, kernels) if kernels and call.norm == 2 else []
    if flat:
        kernels = [layer for layer in kernels if layer not in flat]
        plain = [layer for layer in call.layers if layer in plain or layer in flat]
    queued = []
    if kernels:
        queued.append(_kernel_brackets(call, kernels, starts))
    for chosen, norm in ((turned, dual_norm(call.norm)), (plain, call.norm)):
        if chosen:
            queued.append(_matrix_brackets(call, chosen, norm, starts))
    if len(queued) == 1:
        return queued[0](), starts
    found = LayerBrackets.empty(call.layers, len(call.networks))
    for own in queued:
        found.put(own())
    return found, starts


def _kernels_of_one_tap(call: LayerCall, kernels: Sequence[Layer]) -> list[Layer]:
    """On a device, those whose norm 2 is that of a matrix: they go together with the matrices."""
    networks = call.networks
    if networks[0][kernels[0].weight].is_cpu:
        return []
    return [layer for layer in kernels if is_matrix(operator_of(layer, networks[0][layer.weight]))]


def _matrix_brackets(
    call: LayerCall, chosen: Sequence[Layer], norm: Norm, starts: FoundStarts
) -> _Queued:
    """Brackets of some layers, which are matrices, in this norm of the stored ones."""
    networks = call.networks
    errors = [errors_of_layer(layer, networks, call.norm) for layer in chosen]
    by_layer = [_matrices_of(networks, layer) for layer in chosen]
    if norm == 2 or by_layer[0][0][0].is_cpu or not all(own[0][0].numel() for own in by_layer):
        found = _brackets_of_matrices(call, chosen, by_layer, norm, starts)
    else:
        sums = SumsLater([own[0] for own in by_layer], norm, DEFAULT_MEMORY)
        found = partial(_brackets_of_sums, chosen, sums)

    def read() -> LayerBrackets:
        brackets = found()
        for position, own in enumerate(errors):
            if own is not None:
                brackets.widen(position, own(brackets.upper[:, position].tolist()))
        return brackets

    return read


def _brackets_of_sums(chosen: Sequence[Layer], sums: SumsLater) -> LayerBrackets:
    lower, upper = (np.array(side).T for side in sums.bounds())
    ones = np.ones(lower.shape, dtype=np.int64)
    methods = np.full(lower.shape, "sums", dtype=object)
    return LayerBrackets.of_all(chosen, lower, upper, ones.astype(bool), ones, methods)


def _brackets_of_matrices(
    call: LayerCall,
    chosen: Sequence[Layer],
    by_layer: Sequence[Sequence[Sequence[Tensor]]],
    norm: Norm,
    starts: FoundStarts,
) -> _Queued:
    columns = [column for own in by_layer for column in own]
    matrices = [matrix for row in zip(*columns, strict=True) for matrix in row]
    begin = None
    if any(call.start):
        begin = [
            start
            for entry in call.start
            for layer, own in zip(chosen, by_layer, strict=True)
            for start in [_start_of_layer(entry, layer)] * len(own)
        ]
    result = spectral_norms(matrices, norm=norm, rtol=call.rtol, seed=call.seed, start=begin)
    lower, upper, certified, passes = _on_the_host(result)
    fields = [lower, upper, certified.astype(bool), passes.astype(np.int64)]
    fields.append(np.array(result.method, dtype=object))
    begins = [0, *itertools.accumulate(len(own) for own in by_layer)][:-1]
    if len(columns) > len(chosen):
        fields = _of_groups(fields, len(columns), begins)
    found = LayerBrackets.of_all(chosen, *fields)
    for position, layer in enumerate(chosen):
        if layer.convolution is not None:
            methods = found.methods[:, position]
            methods[methods != "holder"] = "matrix"
        elif norm == 2:
            own = partial(_start_of, result, len(columns), begins[position])
            starts.add(layer.parameter, own)
    return lambda: found


def _of_groups(
    fields: Sequence[npt.NDArray[Any]], columns: int, begins: Sequence[int]
) -> list[npt.NDArray[Any]]:
    """What is said of some matrices side by side, of each layer's: their largest norm."""
    lower, upper, certified, passes, methods = (own.reshape(-1, columns) for own in fields)
    return [
        np.maximum.reduceat(lower, begins, axis=1),
        np.maximum.reduceat(upper, begins, axis=1),
        np.logical_and.reduceat(certified, begins, axis=1),
        np.add.reduceat(passes, begins, axis=1),
        np.maximum.reduceat(methods, begins, axis=1),  # the loose one's name is the last
    ]


def _start_of_layer(start: StartVectors, layer: Layer) -> Tensor | None:
    if layer.convolution is None:
        return start_of_matrix(start, layer.parameter)
    check_start(layer, start.get(layer.parameter))
    return None


def _start_of(
    result: SpectralNorms[Any], columns: int, position: int, network: int
) -> Tensor | None:
    vector: Tensor = result.right[network * columns + position]
    return vector


def _on_the_host(result: SpectralNorms[Any]) -> list[npt.NDArray[Any]]:
    """Lower and upper bounds, whether certified, and passes."""
    if result._known is not None:
        return [np.array(column) for column in result._known]
    return [f.numpy() for f in (result.lower, result.upper, result.certified, result.passes)]


def _kernel_brackets(call: LayerCall, kernels: Sequence[Layer], starts: FoundStarts) -> _Queued:
    """Brackets of the layers that are convolutions."""
    networks = call.networks
    errors = [errors_of_layer(layer, networks, call.norm) for layer in kernels]
    results = _brackets_of_kernels(call, kernels)

    def read() -> LayerBrackets:
        by_layer = results()
        for layer, own in zip(kernels, by_layer, strict=True):
            starts.add(layer.parameter, partial(_start_of_kernel, own))
        rows = [result for row in zip(*by_layer, strict=True) for result in row]
        found = LayerBrackets.of_all(
            kernels,
            *(np.array([getattr(result, name) for result in rows]) for name in _FIELDS),
            np.array([result.method for result in rows], dtype=object),
        )
        for position, errors_of in enumerate(errors):
            if errors_of is not None:
                found.widen(position, errors_of(found.upper[:, position].tolist()))
        return found

    return read


def _start_of_kernel(found: Sequence[NormBracket], network: int) -> ConvStart | None:
    start = found[network].start
    return None if start is None else start()


def _brackets_of_kernels(
    call: LayerCall, kernels: Sequence[Layer]
) -> Callable[[], list[list[NormBracket]]]:
    """For each layer those of all networks: on the CPU in one native call."""
    networks = call.networks
    begin = [[entry.get(layer.parameter) for layer in kernels] for entry in call.start]
    if networks[0][kernels[0].weight].is_cpu:
        results = convolution_brackets(
            [layer for _ in networks for layer in kernels],
            [entry[layer.weight] for entry in networks for layer in kernels],
            call.norm,
            rtol=call.rtol,
            seed=call.seed,
            start=[start for own in begin for start in own],
        )
        return lambda: [results[position :: len(kernels)] for position in range(len(kernels))]
    if call.norm == 2:
        for own in begin:
            for layer, start in zip(kernels, own, strict=True):
                check_start(layer, start)
        weights = [_native_dtype(networks.together(layer.weight)) for layer in kernels]
        return brackets_later(kernels, weights, rtol=call.rtol, seed=call.seed)
    sums = [sums_of_kernels(layer, networks.together(layer.weight), call.norm) for layer in kernels]
    return lambda: [own() for own in sums]


def _matrices_of(networks: ResolvedNetworks, layer: Layer) -> list[list[Tensor]]:
    """The matrices of all networks whose norm is a layer's: one, or one for each group."""
    name = layer.weight
    if layer.convolution is None:
        if networks.lies_together(name):
            # One copy where there must be one, not one for each network.
            return [list(_native_dtype(networks.together(name)).contiguous().unbind())]
        return [[_native_dtype(entry[name]) for entry in networks]]
    weights = _native_dtype(networks.together(name))
    conv = operator_of(layer, weights[0])
    taps = conv.side_by_side(weights).taps()
    taps = taps.reshape(len(networks), -1, *taps.shape[4:])
    return [list(column.unbind()) for column in taps.unbind(1)]


def _native_dtype(weight: Tensor) -> Tensor:
    """Give the weight a dtype of the native op: half precision and integers widen exactly."""
    if weight.requires_grad:
        weight = weight.detach()
    if weight.dtype in (torch.float32, torch.float64):
        return weight
    return weight.float() if weight.is_floating_point() else weight.double()
