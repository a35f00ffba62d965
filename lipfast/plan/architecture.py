"""Architectures: what tracing finds, as frozen data that knows nothing of bounds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lipfast.errors import UnsupportedOpError
from lipfast.graph.nodes import Constant, Graph, Node, computed_name, error_name
from lipfast.plan.chain import Chain, find_chain, is_piecewise_linear
from lipfast.plan.circular import join_circular_padding
from lipfast.plan.compositions import join_compositions
from lipfast.plan.computed import rounded
from lipfast.plan.derived import derived, underived
from lipfast.plan.extrema import join_extrema
from lipfast.plan.fold import FoldedGraph, fold_batch_norm, parameter_shapes
from lipfast.plan.layers import Layer, layers_of
from lipfast.plan.merge import merge_affine
from lipfast.plan.parts import join_parts
from lipfast.plan.repeated import join_repeated
from lipfast.plan.requirements import Requirements, requirements_of
from lipfast.plan.residual import join_residuals
from lipfast.rules.registry import users_rules
from lipfast.text import given_rules

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Architecture:
    """A traced architecture: a graph of nodes with rules; holds no weights.

    What bounds need to know of it is derived once, as cached properties.

    Attributes:
        graph: nodes in topological order.
        parameters: name -> shape: what a state dict must hold.
        aliases: name -> other names of the same tensor (tied weights).
        constants: small tensors that belong to the architecture.
        dtype: floating dtype of the input that it was traced with.
        computed: nodes on parameters and constants only (weight norm, masks, class tokens): their
            results are computed once per state dict and count as parameters.
        given: ops whose rules were a user's when it was traced; see `rules_given`.
    """

    graph: Graph
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Constant]
    dtype: torch.dtype
    computed: tuple[Node, ...] = ()
    given: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __getstate__(self) -> dict[str, Any]:
        return underived(vars(self))

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one sample, for each input."""
        return tuple(node.shape for node in self.graph.inputs)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the result for one sample, for each output."""
        return tuple(self.graph.node(name).shape for name in self.graph.outputs)

    @cached_property
    def jacobian_shape(self) -> tuple[int, int]:
        """Numbers of outputs and of inputs for one sample, several of either joined: (K, D)."""
        return _entry_count(self.output_shapes), _entry_count(self.input_shapes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, computed ones (and the bounds of their errors) included."""
        found = {name: tuple(shape) for name, shape in self.parameters.items()}
        for node in self.computed:
            name = computed_name(node.name)
            found[name] = found[error_name(name)] = node.shape
        return found

    @derived
    def used_parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the graph refers to, and of the errors of computed ones."""
        names = dict.fromkeys(_referred(self.graph.nodes))
        inexact = [computed_name(name) for name in rounded(self.computed)]
        errors = [error_name(name) for name in names if name in inexact]
        return (*names, *errors)

    @cached_property
    def stored_parameters(self) -> tuple[str, ...]:
        """Entries of the state dict that the function depends on, directly or computed from."""
        names = dict.fromkeys([*_referred(self.graph.nodes), *_referred(self.computed)])
        return tuple(name for name in names if name in self.parameters)

    @derived
    def requirements(self) -> Requirements:
        """What the tensors of a state dict must be."""
        return requirements_of(self.graph, self.computed, self.constants, self.parameters)

    @derived
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose operator norms the bound needs, in the order of evaluation."""
        return self.layers_of(self.folded)

    def layers_of(self, folded: FoldedGraph) -> tuple[Layer, ...]:
        """The layers of a graph of this architecture; see `layers`."""
        return layers_of(folded, self.shapes)

    @cached_property
    def unfolded(self) -> FoldedGraph:
        """The graph as it was traced."""
        return FoldedGraph(self.graph, {})

    @derived
    def joined(self) -> FoldedGraph:
        """The graph in which ops that are bounded together are one node, for upper bounds."""
        graph = join_residuals(join_extrema(join_repeated(self.graph)), self.computed)
        graph = join_compositions(join_parts(graph, self.constants))
        return self.unfolded if graph is self.graph else FoldedGraph(graph, {})

    @derived
    def unmerged(self) -> FoldedGraph:
        """The graph with BatchNorm folded and affine maps as they are."""
        return join_circular_padding(self._scaled)

    @derived
    def _scaled(self) -> FoldedGraph:
        return fold_batch_norm(self.joined.graph, values=False)

    @derived
    def folded(self) -> FoldedGraph:
        """The graph that upper bounds are computed on: BatchNorm folded, affine maps merged."""
        folded = self._scaled
        shapes = {**self.shapes, **parameter_shapes(folded.maps, self.shapes)}
        merged = merge_affine(folded.graph, shapes, values=False)
        whole = replace(folded, graph=merged.graph, merged=merged.nodes, origins=merged.origins)
        return join_circular_padding(whole)

    @derived
    def chain(self) -> Chain | None:
        """What the fused Jacobian op takes, if the architecture is a chain."""
        return find_chain(self.graph)

    @derived
    def piecewise_linear_chain(self) -> Chain | None:
        """The chain, if `PiecewiseLinearChains` takes it and it is the architecture itself.

        That is, a chain of linear layers, Flatten and piecewise-linear activations, whose weights
        are the state dict's own tensors without any error: no BatchNorm is folded, which would
        round, and nothing that is computed from parameters was rounded.
        """
        names = self.used_parameters
        exact = not any(error_name(name) in names for name in names)
        return self.chain if exact and is_piecewise_linear(self.chain) else None

    @derived
    def rules_given(self) -> tuple[str, ...]:
        """Ops whose rules are a user's, now or when it was traced: what bounds are proved given."""
        nodes = [*self.graph.nodes, *self.computed]
        with suppress(UnsupportedOpError):  # an op lost its rule: then there is no bound
            nodes += self.folded.graph.nodes  # what is bounded together has rules of its own
        return tuple(sorted({*self.given, *users_rules(nodes)}))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the graph, the shapes and the schema; the same for the same architecture."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """Encode as plain JSON."""
        computed = {"computed": [node.to_json() for node in self.computed]} if self.computed else {}
        given = {"given": list(self.given)} if self.given else {}
        return {
            "lipfast_plan": SCHEMA_VERSION,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "aliases": {name: list(others) for name, others in self.aliases.items()},
            "constants": {
                name: {
                    "dtype": value.dtype,
                    "shape": list(value.shape),
                    "values": [entry.hex() for entry in value.values],
                }
                for name, value in self.constants.items()
            },
            "nodes": [node.to_json() for node in self.graph.nodes],
            "outputs": list(self.graph.outputs),
            # Left out where there is none, so that fingerprints of such plans stay as they were.
            **computed,
            **given,
        }

    def __repr__(self) -> str:
        entries = _entry_count(self.parameters.values())
        head = (
            f"{type(self).__name__}({_shapes(self.input_shapes)} -> {_shapes(self.output_shapes)}, "
            f"{len(self.layers)} layers, {entries:,} parameters, {self.fingerprint[:8]}"
        )
        nodes = (*self.computed, *self.graph.nodes)
        given = [f"  {given_rules(self.rules_given)}"] if self.rules_given else []
        return "\n".join([head, *(f"  {node}" for node in nodes), *given, ")"])


def architecture_from_json(value: Mapping[str, Any]) -> Architecture:
    """Invert `Architecture.to_json`; raises what a damaged value makes Python raise."""
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {value['dtype']!r}")
    constants = {
        name: Constant(
            str(entry["dtype"]),
            tuple(entry["shape"]),
            tuple(float.fromhex(number) for number in entry["values"]),
        )
        for name, entry in value["constants"].items()
    }
    return Architecture(
        Graph(tuple(Node.from_json(node) for node in value["nodes"]), tuple(value["outputs"])),
        {name: tuple(shape) for name, shape in value["parameters"].items()},
        {name: tuple(others) for name, others in value["aliases"].items()},
        constants,
        dtype,
        tuple(Node.from_json(node) for node in value.get("computed", ())),
        tuple(str(op) for op in value.get("given", ())),
    )


def _referred(nodes: Iterable[Node]) -> list[str]:
    """Names of the parameters that nodes refer to, in order."""
    return [name for node in nodes for name in node.names("parameter")]


def _entry_count(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(str(size) for size in shape) or "scalar" for shape in shapes)
