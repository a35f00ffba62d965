"""Evaluate a graph for many networks and many samples at once, from stacked state dicts.

Activations are ``(networks, samples, *shape)``, parameters ``(networks, *shape)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.plan.graph import Argument, Constant, Graph, Node, Reference
from lipfast.rules.registry import RULES


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
        self._activations = activations
        self._parameters = parameters
        self._constants = constants

    def value(self, argument: Argument) -> Tensor:
        """Activation (networks, samples, *shape), parameter or constant (networks, *shape)."""
        if isinstance(argument, Reference):
            if argument.kind == "node":
                return self._activations[argument.name]
            if argument.kind == "parameter":
                return self._parameters[argument.name]
            if argument.kind == "constant":
                return self._constants[argument.name].unsqueeze(0)
        raise ArgumentError(f"{self.node}: {argument} is not a tensor")


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
    tensors = {
        name: value.tensor().to(inputs[0].dtype).to(inputs[0].device)
        for name, value in constants.items()
    }
    activations: dict[str, Tensor] = {
        node.name: value for node, value in zip(graph.inputs, inputs, strict=True)
    }
    last_use = _last_uses(graph)
    for position, node in enumerate(graph.nodes):
        if node.op != "input":
            arguments = NodeArguments(node, activations, parameters, tensors)
            activations[node.name] = _evaluate(arguments, activations, parameters, tensors)
            if visit is not None:
                visit(arguments, activations[node.name])
        if not keep:
            for name in last_use.get(position, ()):
                del activations[name]
    return activations


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
        for reference in node.references():
            if reference.kind == "node":
                last[reference.name] = position
    uses: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in graph.outputs:
            uses.setdefault(position, []).append(name)
    return uses


def _evaluate(
    arguments: NodeArguments,
    activations: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> Tensor:
    node = arguments.node
    rule = RULES.get(node.op)
    if rule is not None and rule.evaluate is not None:
        return rule.evaluate(arguments)
    kinds = {reference.kind for reference in node.references()}
    if "parameter" in kinds:
        return _network_by_network(node, activations, parameters, constants)
    # Without parameters all networks do the same: their samples make one long batch.
    merged = {
        reference.name: activations[reference.name].flatten(0, 1)
        for reference in node.references()
        if reference.kind == "node"
    }
    networks, samples = next(
        activations[reference.name].shape[:2]
        for reference in node.references()
        if reference.kind == "node"
    )
    result = _call(node, merged, {}, constants, networks * samples)
    return result.reshape(networks, samples, *result.shape[1:])


def _network_by_network(
    node: Node,
    activations: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
) -> Tensor:
    references = list(node.references())
    nodes = [reference.name for reference in references if reference.kind == "node"]
    names = [reference.name for reference in references if reference.kind == "parameter"]
    networks, samples = activations[nodes[0]].shape[:2]
    results = [
        _call(
            node,
            {name: activations[name][network] for name in nodes},
            {name: parameters[name][network] for name in names},
            constants,
            samples,
        )
        for network in range(networks)
    ]
    return torch.stack(results)


def _call(
    node: Node,
    activations: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    samples: int,
) -> Tensor:
    def resolve(value: Argument) -> Any:
        if isinstance(value, tuple):
            return [resolve(entry) for entry in value]
        if not isinstance(value, Reference):
            return value
        if value.kind == "batch":
            return samples
        if value.kind == "dtype":
            return getattr(torch, value.name)
        tables = {"node": activations, "parameter": parameters, "constant": constants}
        return tables[value.kind][value.name]

    namespace, name = node.op.split(".")
    operator = getattr(getattr(torch.ops, namespace), name)
    result = operator(
        *(resolve(value) for value in node.args),
        **{key: resolve(value) for key, value in node.kwargs},
    )
    assert isinstance(result, Tensor)
    return result
