"""Recognise a graph as a chain: what the fused Jacobian op takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lipfast.graph.nodes import Constant, Graph, Node, Reference
from lipfast.ops.chain_jacobian_norms import (
    Activation,
    AveragePool,
    ConvStage,
    Flatten,
    Linear,
    MaxPool,
    Stage,
)
from lipfast.ops.chain_secants import has_secant_kernel
from lipfast.plan.fold import Folded, fold_batch_norm, folded_parameters
from lipfast.rules.convolution import settings

_RESHAPES = frozenset(
    {
        "aten.flatten",
        "aten.reshape",
        "aten.squeeze",
        "aten.unflatten",
        "aten.unsqueeze",
        "aten.view",
        "aten._unsafe_view",
    }
)


@dataclass(frozen=True)
class Chain:
    """Affine maps, activations and pools, one after the other; BatchNorm is folded.

    Attributes:
        stages: first stage first.
        weights: names of the weights, one for each affine stage.
        biases: names of the biases, None where there is none.
        maps: how weights that are not in the state dict are computed.
    """

    stages: tuple[Stage, ...]
    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    transposed: tuple[bool, ...]
    maps: Mapping[str, Folded]

    def parameters(
        self, state_dict: Mapping[str, Tensor], constants: Mapping[str, Constant]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of one network, in the order of the stages."""
        tensors = state_dict
        if self.maps:
            tensors = {**state_dict, **folded_parameters(self.maps, state_dict, constants)}
        weights = [
            tensors[name].mT if transposed else tensors[name]
            for name, transposed in zip(self.weights, self.transposed, strict=True)
        ]
        return weights, [None if name is None else tensors[name] for name in self.biases]


def find_chain(graph: Graph) -> Chain | None:
    """Read a graph as a chain of linear layers, convolutions, pools and activations, if it is one.

    Args:
        graph: with one input and one output.

    Returns:
        The chain, or None where a node is something else, or a result is read twice.
    """
    folded = fold_batch_norm(graph, values=True)
    graph = folded.graph
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return None
    found = _Stages()
    previous = graph.nodes[0]
    for node in graph.nodes[1:]:
        source = node.args[0] if node.args else None
        tensors = [ref for ref in node.references() if ref.kind == "node"]
        if source != Reference("node", previous.name) or len(tensors) != 1:
            return None
        if not found.add(node, previous.shape):
            return None
        previous = node
    if not found.weights or graph.outputs != (previous.name,):
        return None
    return Chain(
        tuple(found.stages),
        tuple(found.weights),
        tuple(found.biases),
        tuple(found.transposed),
        folded.maps,
    )


def is_piecewise_linear(chain: Chain | None) -> bool:
    """Whether a chain has linear layers, Flatten and piecewise-linear activations only.

    One with BatchNorm has not: folding rounds.
    """
    return chain is not None and not chain.maps and has_secant_kernel(chain.stages)


class _Stages:
    """Collects stages node by node."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.weights: list[str] = []
        self.biases: list[str | None] = []
        self.transposed: list[bool] = []

    def add(self, node: Node, shape: tuple[int, ...]) -> bool:
        """Append the stages of a node that reads a sample of this shape; False if it has none."""
        if node.op in ("aten.linear", "lipfast.matmul"):
            return len(shape) == 1 and self._affine(Linear(), node)
        if node.op in ("aten.conv1d", "aten.conv2d"):
            stage = _convolution(node)
            return stage is not None and self._affine(stage, node)
        if node.op in _RESHAPES:
            if node.shape == shape:
                return True
            self.stages.append(Flatten())
            return len(node.shape) == 1
        if node.op == "aten.mean":
            return self._global_mean(node, shape)
        stage = _pool(node, shape) or _activation(node)
        if stage is not None:
            self.stages.append(stage)
        return stage is not None

    def _affine(self, stage: Stage, node: Node) -> bool:
        weight, bias = node.args[1], node.argument(2, "bias")
        assert isinstance(weight, Reference)
        self.stages.append(stage)
        self.weights.append(weight.name)
        self.biases.append(bias.name if isinstance(bias, Reference) else None)
        self.transposed.append(node.op == "lipfast.matmul")
        return True

    def _global_mean(self, node: Node, shape: tuple[int, ...]) -> bool:
        axes = tuple(range(2, len(shape) + 1))
        if len(shape) not in (2, 3) or tuple(sorted(node.dimensions(1, "dim"))) != axes:
            return False
        self.stages.append(AveragePool(shape[1:], shape[1:], (0,) * len(axes)))
        if len(node.shape) == 1:
            self.stages.append(Flatten())
        return len(node.shape) in (1, len(shape))


def _convolution(node: Node) -> Stage | None:
    found = settings(node)
    if found.padding == "same":
        return None  # the kernel's size is not known here, and the padding may be uneven
    return ConvStage(found.stride, found.padding, found.dilation, found.groups)


def _pool(node: Node, shape: tuple[int, ...]) -> Stage | None:
    kind, _, axes_name = node.op.partition("_pool")
    axes = {"1d": 1, "2d": 2}.get(axes_name, 0)
    if axes == 0 or len(shape) != axes + 1:
        return None
    if kind == "aten.adaptive_avg":
        return _adaptive_pool(node, shape)
    if kind not in ("aten.max", "aten.avg"):
        return None
    kernel = node.integers(1, "kernel_size", axes)
    given = node.argument(2, "stride") not in (None, ())
    stride = node.integers(2, "stride", axes) if given else kernel
    padding = node.integers(3, "padding", axes, 0)
    if kind == "aten.max":
        dilation = node.integers(4, "dilation", axes, 1)
        return MaxPool(kernel, stride, padding, dilation, node.argument(5, "ceil_mode") is True)
    if node.argument(6, "divisor_override") is not None:
        return None
    ceil_mode = node.argument(4, "ceil_mode") is True
    include = node.argument(5, "count_include_pad", True) is not False
    return AveragePool(kernel, stride, padding, ceil_mode, include)


def _adaptive_pool(node: Node, shape: tuple[int, ...]) -> Stage | None:
    """An adaptive pool whose windows do not overlap is an ordinary one."""
    sizes = tuple(zip(shape[1:], node.shape[1:], strict=True))
    if any(size % count for size, count in sizes):
        return None
    kernel = tuple(size // count for size, count in sizes)
    return AveragePool(kernel, kernel, (0,) * len(kernel))


# Parameters of each activation: position, name and default of the arguments.
_ACTIVATIONS: dict[str, tuple[tuple[int, str, float], ...]] = {
    "aten.relu": (),
    "aten.relu6": (),
    "aten.tanh": (),
    "aten.sigmoid": (),
    "aten.silu": (),
    "aten.gelu": (),
    "aten.leaky_relu": ((1, "negative_slope", 0.01),),
    "aten.hardtanh": ((1, "min_val", -1.0), (2, "max_val", 1.0)),
    "aten.softplus": ((1, "beta", 1.0), (2, "threshold", 20.0)),
    "aten.elu": ((1, "alpha", 1.0), (2, "scale", 1.0), (3, "input_scale", 1.0)),
}


def _activation(node: Node) -> Stage | None:
    if node.op not in _ACTIVATIONS:
        return None
    name = node.op.removeprefix("aten.")
    parameters = tuple(node.number(*argument) for argument in _ACTIVATIONS[node.op])
    if name == "gelu" and node.argument(1, "approximate") == "tanh":
        name = "gelu_tanh"
    if name == "elu":
        if parameters[1:] != (1.0, 1.0):
            return None
        parameters = parameters[:1]
    return Activation(name, parameters) if all(map(math.isfinite, parameters)) else None
