"""The layers of an architecture: which operator norms a bound needs, and of which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lipfast.graph.nodes import Node, Reference, computed_name, is_computed
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.merge import merged_layers
from lipfast.rules.registry import Convolution, LayerRequest, lookup


@dataclass(frozen=True)
class Layer:
    """A layer whose operator norm the bound needs.

    Attributes:
        index: position among the layers.
        name: module path (name of the weight without its last part).
        kind: for instance ``linear``.
        parameter: name of the weight in the state dict.
        shape: of the weight.
        transposed: the operator is the transpose of the stored matrix.
        node: name of the node in the graph.
        weight: name of the operator's weight: `parameter`, or what BatchNorms make of it.
        folds: how many BatchNorms are folded into it.
        convolution: how the weight is applied, if it is a kernel.
        input_shape: of one sample where it meets the layer.
        output_shape: of one sample behind it.
    """

    index: int
    name: str
    kind: str
    parameter: str
    shape: tuple[int, ...]
    transposed: bool
    node: str
    weight: str = ""
    folds: int = 0
    convolution: Convolution | None = None
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()


def layers_of(folded: FoldedGraph, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Layer, ...]:
    """The layers of a graph, in the order of evaluation.

    Args:
        folded: an architecture's graph, perhaps with BatchNorm folded and affine maps merged.
        shapes: of the architecture's parameters, computed ones included.
    """
    found: list[Layer] = []
    for node in folded.graph.nodes:
        request = _request(node)
        if request is not None:
            found.append(_layer_of(len(found), node, request, folded, shapes))
    return tuple(found)


def _layer_of(
    index: int,
    node: Node,
    request: LayerRequest,
    folded: FoldedGraph,
    shapes: Mapping[str, tuple[int, ...]],
) -> Layer:
    source = node.args[0]
    assert isinstance(source, Reference)
    if node.name in folded.origins:
        return _merged_layer(index, node, request, folded)
    map_ = folded.maps.get(node.name)
    parameter = request.parameter
    if map_ is not None and map_.weight is not None:
        parameter = map_.weight
    folds = 0 if map_ is None else len(map_.scalings)
    return Layer(
        index=index,
        name=node.module if is_computed(parameter) else parameter.rpartition(".")[0] or parameter,
        kind=request.kind + " + batch norm" * folds,
        parameter=parameter,
        shape=shapes[parameter],
        transposed=request.transposed,
        node=node.name,
        weight=request.parameter,
        folds=folds,
        convolution=request.convolution,
        input_shape=folded.graph.node(source.name).shape,
        output_shape=node.shape,
    )


def _merged_layer(index: int, node: Node, request: LayerRequest, folded: FoldedGraph) -> Layer:
    source = node.args[0]
    assert isinstance(source, Reference)
    origins = []
    for origin in folded.origins[node.name]:
        map_ = folded.maps.get(origin.removeprefix("folded:").removesuffix(".weight"))
        origins.append(origin if map_ is None else map_.weight or origin)
    weights = {computed_name(found.name): found.shape for found in folded.merged}
    return Layer(
        index=index,
        name=merged_layers(origins),
        kind=f"{request.kind}, {len(origins)} merged",
        parameter=request.parameter,
        shape=weights[request.parameter],
        transposed=request.transposed,
        node=node.name,
        weight=request.parameter,
        convolution=request.convolution,
        input_shape=folded.graph.node(source.name).shape,
        output_shape=node.shape,
    )


def _request(node: Node) -> LayerRequest | None:
    if node.op == "input":
        return None
    rule = lookup(node.op)
    return None if rule.layer is None else rule.layer(node)
