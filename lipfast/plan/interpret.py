"""Evaluate a graph for many networks and many samples at once, from stacked state dicts.

Activations are ``(networks, samples, *shape)``, parameters ``(networks, *shape)``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, naming
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Graph, Node, Reference
from lipfast.ops.fetched import sent
from lipfast.rules.registry import rule_of


class NodeArguments:
    """The operands of one node; what a rule's `evaluate` and `error` functions see."""

    def __init__(
        self,
        node: Node,
        activations: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
    ) -> None:
        self.node = node
        self._tables = {"node": activations, "parameter": parameters, "constant": constants}

    @property
    def live(self) -> Collection[str]:
        """Names of the nodes whose activations are still kept."""
        return self._tables["node"].keys()

    def of_node(self, name: str) -> Tensor:
        """Activation (networks, samples, *shape) of a node by its name."""
        return self._tables["node"][name]

    def value(self, argument: Argument) -> Tensor:
        """Activation (networks, samples, *shape), parameter or constant (networks, *shape)."""
        if isinstance(argument, Reference) and argument.kind in self._tables:
            value = self._tables[argument.kind][argument.name]
            return value.unsqueeze(0) if argument.kind == "constant" else value
        raise ArgumentError(f"{self.node}: {argument} is not a tensor")

    def shape(self, argument: Argument) -> tuple[int, ...]:
        """Shape of an activation for one sample, or of a parameter or constant."""
        value = self.value(argument)
        activation = isinstance(argument, Reference) and argument.kind == "node"
        return tuple(value.shape[2 if activation else 1 :])

    def replaced(
        self, activations: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
    ) -> Tensor:
        """The result for other operands."""
        nodes = {**self._tables["node"], **activations}
        weights = {**self._tables["parameter"], **parameters}
        return _result_of(NodeArguments(self.node, nodes, weights, self._tables["constant"]))

    def apply(self, replaced: Mapping[Reference, Tensor]) -> Tensor:
        """The op itself on the operands, some of them replaced by other tensors alike."""
        tables = {
            ref: replaced[ref] if ref in replaced else self._tables[ref.kind][ref.name]
            for ref in self.node.references()
            if ref.kind in self._tables
        }
        networks, samples = next(
            value.shape[:2] for ref, value in tables.items() if ref.kind == "node"
        )
        if any(ref.kind == "parameter" for ref in tables):
            results = []
            for network in range(networks):
                one = {
                    ref: value if ref.kind == "constant" else value[network]
                    for ref, value in tables.items()
                }
                results.append(call_op(self.node, one.__getitem__, samples))
            return torch.stack(results)
        # Without parameters all networks do the same: their samples make one long batch.
        merged = {
            ref: value.flatten(0, 1) if ref.kind == "node" else value
            for ref, value in tables.items()
        }
        result = call_op(self.node, merged.__getitem__, networks * samples)
        return result.reshape(networks, samples, *result.shape[1:])


def walk(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
    inputs: Sequence[Tensor],
    visit: Callable[[NodeArguments, Tensor], None] | None = None,
    *,
    keep: bool = False,
) -> dict[str, Tensor]:
    """Evaluate every node.

    Args:
        graph: what to evaluate.
        parameters: stacked over the networks, all of one floating dtype.
        constants: small tensors of the plan.
        inputs: one tensor (networks, samples, *shape) per input, of the same dtype.
        visit: called after each node with its operands and its result.
        keep: keep all activations, not only the outputs.

    Returns:
        Activations by node name: those of the outputs, or all of them.
    """
    tensors = {name: _like(value.tensor(), inputs[0]) for name, value in constants.items()}
    activations: dict[str, Tensor] = {
        node.name: value for node, value in zip(graph.inputs, inputs, strict=True)
    }
    last_use = _last_uses(graph)
    for position, node in enumerate(graph.nodes):
        if node.op != "input":
            arguments = NodeArguments(node, activations, parameters, tensors)
            activations[node.name] = _result_of(arguments)
            if visit is not None:
                visit(arguments, activations[node.name])
        if not keep:
            for name in last_use.get(position, ()):
                del activations[name]
    return activations


def _like(constant: Tensor, activation: Tensor) -> Tensor:
    """On the activations' device; numbers in their dtype, indices and masks as they are."""
    typed = constant.to(activation.dtype) if constant.dtype.is_floating_point else constant
    return sent(typed, activation.device)


def evaluate(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
    inputs: Sequence[Tensor],
) -> Tensor:
    """All outputs of the graph, flattened and joined: (networks, samples, K)."""
    return joined_outputs(graph, walk(graph, parameters, constants, inputs))


def joined_outputs(graph: Graph, activations: Mapping[str, Tensor]) -> Tensor:
    """Join the outputs to one vector per sample; an output that occurs twice counts twice."""
    outputs = [activations[name] for name in graph.outputs]
    rows = [value.reshape(*value.shape[:2], -1) for value in outputs]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def _last_uses(graph: Graph) -> dict[int, list[str]]:
    """Position -> activations that nothing reads afterwards."""
    last: dict[str, int] = {}
    for position, node in enumerate(graph.nodes):
        last[node.name] = position
        last.update(dict.fromkeys(node.names("node"), position))
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in graph.outputs:
            uses.setdefault(position, []).append(name)
    return uses


def _result_of(arguments: NodeArguments) -> Tensor:
    node = arguments.node
    own = rule_of(node.op).evaluate
    with naming(node.op, node.module):
        return arguments.apply({}) if own is None else own(arguments)
