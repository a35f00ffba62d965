"""Recognise a graph as a chain: what the fused Jacobian op takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.graph.nodes import Constant, Graph, Node, Reference
from lipfast.ops.chain_secants import has_secant_kernel
from lipfast.ops.chain_stages import Stage, is_affine
from lipfast.ops.stack import converted
from lipfast.plan.fold import Folded, fold_batch_norm, folded_parameters, folded_together
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.registry import rule_of

_PARAMETERS = ((1, "weight"), (2, "bias"))


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
        self,
        state_dict: Mapping[str, Tensor],
        constants: Mapping[str, Constant],
        where: str = "",
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Weights and biases of one network, in the order of the stages.

        Raises:
            NonFiniteError: a BatchNorm cannot be folded.
        """
        if not self.maps:
            return self._in_order(state_dict)
        found = folded_parameters(self.maps, state_dict, constants, where)
        return self._in_order({**state_dict, **found})

    def _in_order(self, tensors: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        weights = [
            tensors[name].mT if transposed else tensors[name]
            for name, transposed in zip(self.weights, self.transposed, strict=True)
        ]
        return weights, [None if name is None else tensors[name] for name in self.biases]

    def parameters_together(
        self,
        networks: ResolvedNetworks,
        constants: Mapping[str, Constant],
        dtype: torch.dtype,
        checks: list[Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor | None]] | None:
        """Weights and biases of all networks in a dtype, (N, *shape) each.

        None where they do not lie together, or would have to be looked at one by one.

        Args:
            networks: resolved.
            constants: of the plan.
            dtype: of the result.
            checks: a truth value is put here that must be looked at before they are used; without
                a list, what has to be folded is not.
        """
        names = [*self.weights, *(name for name in self.biases if name is not None)]
        new: dict[str, Tensor] = {}
        if self.maps:
            found = None if checks is None else folded_together(self.maps, networks, constants)
            if found is None or checks is None:
                return None
            new, right = found
            checks.append(right.all())
        elif not all(map(networks.lies_together, names)):
            return None
        stored = networks.tensors(name for name in names if name not in new)
        weights, biases = self._in_order({**stored, **new})
        return (
            [weight.to(dtype) for weight in weights],
            [None if bias is None else bias.to(dtype) for bias in biases],
        )

    def parameters_of(
        self,
        state_dicts: Sequence[Mapping[str, Tensor]],
        constants: Mapping[str, Constant],
        dtype: torch.dtype | None = None,
    ) -> tuple[list[list[Tensor]], list[list[Tensor | None]]]:
        """Weights and biases of each network; in a dtype, if one is given.

        Those of stacked state dicts are converted together. Errors say which of several networks.
        """
        several = len(state_dicts) > 1
        found = [
            self.parameters(entry, constants, f"state dict {index}: " if several else "")
            for index, entry in enumerate(state_dicts)
        ]
        weights, biases = [own[0] for own in found], [own[1] for own in found]
        if dtype is None or (len(found) == 1 and _all_are(dtype, found[0])):
            return weights, biases
        columns = [converted(own, dtype) for own in zip(*weights, strict=True)]
        shifts: list[Sequence[Tensor | None]] = [
            [None] * len(found) if name is None else converted([own[i] for own in biases], dtype)  # type: ignore[misc]
            for i, name in enumerate(self.biases)
        ]
        rows, others = zip(*columns, strict=True), zip(*shifts, strict=True)
        return [list(row) for row in rows], [list(row) for row in others]


def _all_are(dtype: torch.dtype, found: tuple[list[Tensor], list[Tensor | None]]) -> bool:
    weights, biases = found
    return all(tensor.dtype is dtype for tensor in weights) and all(
        tensor is None or tensor.dtype is dtype for tensor in biases
    )


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
    stages: list[Stage] = []
    affine: list[Node] = []
    previous = graph.nodes[0]
    for node in graph.nodes[1:]:
        source = node.args[0] if node.args else None
        tensors = [ref for ref in node.references() if ref.kind == "node"]
        if source != Reference("node", previous.name) or len(tensors) != 1:
            return None
        stage = rule_of(node.op).stage
        own = None if stage is None else stage(node, previous.shape)
        if own is None:
            return None
        stages += own
        affine += [node for stage in own if is_affine(stage)]
        previous = node
    if not affine or graph.outputs != (previous.name,):
        return None
    weights, biases = ([node.operand(*where) for node in affine] for where in _PARAMETERS)
    return Chain(
        tuple(stages),
        tuple(weight.name for weight in weights if weight is not None),
        tuple(None if bias is None else bias.name for bias in biases),
        tuple(rule_of(node.op).affine == "transposed matrix" for node in affine),
        folded.maps,
    )


def is_piecewise_linear(chain: Chain | None) -> bool:
    """Whether a chain has linear layers, Flatten and piecewise-linear activations only.

    One with BatchNorm has not: folding rounds.
    """
    return chain is not None and not chain.maps and has_secant_kernel(chain.stages)
