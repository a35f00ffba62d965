"""The layers of an architecture: which operator norms a bound needs, and of which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lipfast.errors import naming
from lipfast.graph.nodes import Node, computed_name, is_computed
from lipfast.plan.fold import FoldedGraph
from lipfast.plan.merge import merged_layers
from lipfast.rules.registry import ConvSettings, LayerRequest, lookup


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
    convolution: ConvSettings | None = None
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
        layer = None if node.op == "input" else lookup(node.op).layer
        if layer is not None:
            with naming(node.op, node.module):
                found.append(_layer_of(len(found), node, layer(node), folded, shapes))
    return tuple(found)


def _layer_of(
    index: int,
    node: Node,
    request: LayerRequest,
    folded: FoldedGraph,
    shapes: Mapping[str, tuple[int, ...]],
) -> Layer:
    source = node.operand(0, "input")
    assert source is not None
    map_, parameter, folds = folded.maps.get(node.name), request.parameter, 0
    if node.name in folded.origins:
        origins = [_stored_weight(name, folded) for name in folded.origins[node.name]]
        name, kind = merged_layers(origins), f"{request.kind}, {len(origins)} merged"
        shape = next(n.shape for n in folded.merged if computed_name(n.name) == parameter)
    else:
        if map_ is not None:
            parameter, folds = map_.weight, len(map_.scalings)
        name = node.module if is_computed(parameter) else parameter.rpartition(".")[0] or parameter
        kind, shape = request.kind + " + batch norm" * folds, shapes[parameter]
    return Layer(
        index=index,
        name=name,
        kind=kind,
        parameter=parameter,
        shape=shape,
        transposed=request.transposed,
        node=node.name,
        weight=request.parameter,
        folds=folds,
        convolution=request.convolution,
        input_shape=folded.graph.node(source.name).shape,
        output_shape=node.shape,
    )


def _stored_weight(origin: str, folded: FoldedGraph) -> str:
    """The weight of the state dict that a weight is, or that BatchNorms were folded into."""
    map_ = folded.maps.get(origin.removeprefix("folded:").removesuffix(".weight"))
    return origin if map_ is None else map_.weight
