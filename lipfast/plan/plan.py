"""The plan: an architecture traced once, applied to any number of state dicts."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, StateDictError, TraceError
from lipfast.norms import Norm
from lipfast.ops.threads import one_thread
from lipfast.plan.computed import evaluate_computed, rounded
from lipfast.plan.fold import FoldedGraph, fold_batch_norm, parameter_shapes
from lipfast.plan.graph import (
    Constant,
    Graph,
    Node,
    Reference,
    computed_name,
    error_name,
    is_computed,
    node_from_json,
    node_to_json,
)
from lipfast.plan.masks import (
    additive_masks,
    holds_minus_infinity,
    require_numbers,
    require_visible_entries,
)
from lipfast.plan.merge import merge_affine, merged_layers
from lipfast.plan.state import require_finite, resolve
from lipfast.plan.trace import Source, trace
from lipfast.rules.normalization import default_eps
from lipfast.rules.registry import ConvSettings, LayerRequest, lookup, require_rules

if TYPE_CHECKING:
    from lipfast.estimators.domain import Domain
    from lipfast.estimators.estimate import Bounds, LowerBound, UpperBound
    from lipfast.estimators.spectral_product import Starts, Vectors
    from lipfast.estimators.tracker import Tracker

SCHEMA_VERSION = 1
_SMALL = 1 << 20  # elements of a state dict; below, several threads wait longer than they compute
# Here a parameter may be of integers or truth values, which are exact numbers.
_TAKES_INTEGERS = frozenset(
    f"aten.{name}"
    for name in (
        *("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "cat", "stack"),
        "scaled_dot_product_attention",
    )
)
StateDict = Mapping[str, Tensor]


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


class CheckedStateDict(dict[str, Tensor]):
    """Tensors that a plan has checked, under its own names; see `Plan.checked`."""

    def __init__(self, tensors: Mapping[str, Tensor], plan: Plan) -> None:
        super().__init__(tensors)
        self.plan = plan


@dataclass(frozen=True)
class Plan:
    """An architecture as a graph of nodes with rules; holds no weights.

    Made by `lipfast.compile` or `Plan.load`. A plan is immutable, becomes JSON, and evaluates any
    number of state dicts in one call.

    Attributes:
        graph: nodes in topological order.
        parameters: name -> shape: what a state dict must hold.
        aliases: name -> other names of the same tensor (tied weights).
        constants: small tensors that belong to the architecture.
        dtype: floating dtype of the input that it was traced with.
        computed: nodes on parameters and constants only (weight norm, masks, class tokens): their
            results are computed once per state dict and count as parameters.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        >>> plan = lipfast.compile(model, torch.zeros(2, 3))
        >>> plan.input_shapes, plan.output_shapes, dict(plan.parameters)
        (((3,),), ((4,),), {'0.weight': (4, 3), '0.bias': (4,)})
    """

    graph: Graph
    parameters: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Constant]
    dtype: torch.dtype
    computed: tuple[Node, ...] = ()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @staticmethod
    def trace(model: Source, example_input: Tensor | Sequence[Tensor] | None = None) -> Plan:
        """Trace a model; see `lipfast.compile`."""
        found = trace(model, example_input)
        return Plan(
            found.graph,
            found.parameters,
            found.aliases,
            found.constants,
            found.dtype,
            found.computed,
        )

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The layers whose operator norms the bound needs, in the order of evaluation."""
        return self.layers_of(self.folded)

    @cached_property
    def unmerged(self) -> FoldedGraph:
        """The graph with BatchNorm folded and affine maps as they are."""
        return fold_batch_norm(self.graph, values=False)

    @cached_property
    def folded(self) -> FoldedGraph:
        """The graph that upper bounds are computed on: BatchNorm folded, affine maps merged."""
        folded = self.unmerged
        shapes = {**self.shapes, **parameter_shapes(folded.maps, self.shapes)}
        merged = merge_affine(folded.graph, shapes, values=False)
        return replace(folded, graph=merged.graph, merged=merged.nodes, origins=merged.origins)

    def layers_of(self, folded: FoldedGraph) -> tuple[Layer, ...]:
        """The layers of a graph of this plan; see `layers`."""
        found: list[Layer] = []
        for node in folded.graph.nodes:
            request = self._request(node)
            if request is not None:
                found.append(self._layer(len(found), node, request, folded))
        return tuple(found)

    def _layer(self, index: int, node: Node, request: LayerRequest, folded: FoldedGraph) -> Layer:
        source = node.args[0]
        assert isinstance(source, Reference)
        if node.name in folded.origins:
            return self._merged_layer(index, node, request, folded)
        map_ = folded.maps.get(node.name)
        parameter = request.parameter
        if map_ is not None and map_.weight is not None:
            parameter = map_.weight
        folds = 0 if map_ is None else len(map_.scalings)
        return Layer(
            index=index,
            name=node.module
            if is_computed(parameter)
            else parameter.rpartition(".")[0] or parameter,
            kind=request.kind + " + batch norm" * folds,
            parameter=parameter,
            shape=self.shapes[parameter],
            transposed=request.transposed,
            node=node.name,
            weight=request.parameter,
            folds=folds,
            convolution=request.convolution,
            input_shape=folded.graph.node(source.name).shape,
            output_shape=node.shape,
        )

    @staticmethod
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

    @staticmethod
    def _request(node: Node) -> LayerRequest | None:
        if node.op == "input":
            return None
        rule = lookup(node.op)
        return None if rule.layer is None else rule.layer(node)

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of one sample, for each input."""
        return tuple(node.shape for node in self.graph.inputs)

    @property
    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of the result for one sample, for each output."""
        return tuple(self.graph.node(name).shape for name in self.graph.outputs)

    @cached_property
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

    @cached_property
    def _masks(self) -> frozenset[str]:
        """Parameters, computed ones included, that may hold -inf."""
        return additive_masks(self.graph, self.computed)

    @cached_property
    def _hidden(self) -> bool:
        """Whether a constant holds -inf; none may hold NaN."""
        require_numbers(self.constants)
        return any(-math.inf in constant.values for constant in self.constants.values())

    @cached_property
    def _default_eps(self) -> frozenset[float]:
        """The eps of normalisations that have none of their own: that of the trace's dtype."""
        found = (default_eps(node) for node in self.graph.nodes)
        return frozenset(eps for eps in found if eps is not None)

    @cached_property
    def _tables(self) -> frozenset[str]:
        """Parameters that may hold integers or truth values: factors, masks, tables of indices."""
        weights = [node for node in self.graph.nodes if node.op not in _TAKES_INTEGERS]
        return frozenset(self.parameters) - frozenset(_referred(weights))

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, computed ones (and the bounds of their errors) included."""
        found = {name: tuple(shape) for name, shape in self.parameters.items()}
        for node in self.computed:
            name = computed_name(node.name)
            found[name] = found[error_name(name)] = node.shape
        return found

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the graph, the shapes and the schema; the same for the same architecture."""
        text = json.dumps(self._to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def check(self, state_dict: StateDict) -> None:
        """Check that a state dict fits: names, shapes, floating dtypes, finite entries.

        Names may carry the prefixes that DataParallel and `torch.compile` add. Tied weights may
        be stored once.

        Raises:
            StateDictError: names the parameter and both shapes.
            NonFiniteError: names the parameter and says how many entries. Masks that are added to
                activations may hold -inf, as long as every softmax keeps an entry.
        """
        self.resolve(state_dict)

    def resolve(self, state_dict: StateDict, where: str = "") -> dict[str, Tensor]:
        """`check`, and the tensors under the plan's own names."""
        if isinstance(state_dict, CheckedStateDict) and state_dict.plan is self:
            return state_dict
        tensors = resolve(state_dict, self.parameters, self.aliases, where)
        numbers = [
            name
            for name in self.stored_parameters
            if name not in self._tables or tensors[name].dtype.is_floating_point
        ]
        small = sum(math.prod(shape) for shape in self.parameters.values()) < _SMALL
        with one_thread() if small else nullcontext():
            require_finite(tensors, numbers, where, self._masks)
        self._require_dtype(tensors, where)
        if self.computed:
            found = evaluate_computed(self.computed, tensors, self.constants, where)
            tensors = {**tensors, **found}
        if self._hidden or any(holds_minus_infinity(tensors[name]) for name in self._masks):
            require_visible_entries(self.graph, tensors, self.constants, where)
        return tensors

    def _require_dtype(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """A normalisation without an eps takes it from the dtype, which must be that of the trace.

        Raises:
            StateDictError: the weights are float64 and those of the trace were not, or vice versa.
        """
        if not self._default_eps:
            return
        dtypes = {tensors[name].dtype for name in self.stored_parameters}
        dtypes = {dtype for dtype in dtypes if dtype.is_floating_point}
        double = torch.finfo(torch.float64).eps in self._default_eps
        wrong = torch.float64 not in dtypes if double else dtypes == {torch.float64}
        if not dtypes or not wrong:
            return
        raise StateDictError(
            f"{where}the weights are {'not ' if double else ''}float64, and those of the trace "
            f"were{'' if double else ' not'}: an RMSNorm without eps takes that of the "
            "dtype. Trace the model in the dtype of the state dict, or give RMSNorm an eps."
        )

    def resolve_all(self, state_dicts: StateDict | Sequence[StateDict]) -> list[dict[str, Tensor]]:
        """`resolve` one or many state dicts; errors say which entry of a list."""
        if isinstance(state_dicts, Mapping):
            return [self.resolve(state_dicts)]
        if isinstance(state_dicts, torch.nn.Module):
            raise ArgumentError("expected a state dict or a list of them: give model.state_dict()")
        if not isinstance(state_dicts, Iterable):
            raise ArgumentError(
                f"expected a state dict or a list of them, not {type(state_dicts).__name__}"
            )
        entries = list(state_dicts)
        where = [f"state dict {index}: " for index in range(len(entries))]
        return [self.resolve(e, w) for e, w in zip(entries, where, strict=True)]

    def checked(self, state_dicts: Sequence[StateDict]) -> list[CheckedStateDict]:
        """Check state dicts once for several bounds; until then their tensors must not change.

        Raises:
            StateDictError, NonFiniteError: one does not fit; says which.
        """
        return [CheckedStateDict(entry, self) for entry in self.resolve_all(state_dicts)]

    # The estimators stand above plans, so they are imported where they are called: these methods
    # are the public face of functions that take a plan.

    @overload
    def upper(
        self,
        state_dicts: StateDict,
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        start: Vectors | None = None,
        simplify: bool = True,
        domain: Domain | None = None,
    ) -> UpperBound: ...
    @overload
    def upper(
        self,
        state_dicts: Sequence[StateDict],
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        start: Starts = None,
        simplify: bool = True,
        domain: Domain | None = None,
    ) -> list[UpperBound]: ...
    def upper(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        start: Starts = None,
        simplify: bool = True,
        domain: Domain | None = None,
    ) -> UpperBound | list[UpperBound]:
        """Certified upper bounds on the Lipschitz constant; see `spectral_product.upper_bounds`.

        Args:
            state_dicts: one state dict, or a list of them (all layers of all are one native call).
            norm: 1, 2 or inf, of inputs and outputs alike.
            rtol: relative gap of each layer's bracket.
            seed: of the start vectors.
            start: start vectors by the name of the weight, for instance `Tracker.vectors`: one
                mapping for all state dicts, or a list with one (or None) for each. The bounds are
                certified whatever they are.
            simplify: fold BatchNorm into its neighbours and merge affine maps that follow one
                another; False gives the published product, layer by layer.
            domain: `lipfast.Box` or `lipfast.Ball`: the bound holds for inputs in this set; without
                one for all inputs.

        Returns:
            One `UpperBound`, or a list in the order of the state dicts.

        Raises:
            StateDictError, NonFiniteError: a state dict does not fit the architecture.
            ArgumentError: a start vector does not fit it.

        Examples:
            >>> import torch, lipfast
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
            >>> plan = lipfast.compile(model, torch.zeros(2, 2))
            >>> weights = {"0.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
            >>> round(plan.upper(weights).value, 5)  # at most 1e-6 above, relative
            4.0
        """
        from lipfast.estimators.spectral_product import upper_bounds  # noqa: PLC0415

        results, _ = upper_bounds(
            self,
            state_dicts,
            norm=norm,
            rtol=rtol,
            seed=seed,
            start=start,
            simplify=simplify,
            domain=domain,
        )
        return results[0] if isinstance(state_dicts, Mapping) else results

    def tracker(self, *, norm: Norm = 2, rtol: float = 1e-6, seed: int = 0) -> Tracker:
        """Upper bounds along a run, each from the singular vectors before it; see `Tracker`.

        Args:
            norm: 1, 2 or inf; the same for the whole run.
            rtol: relative gap of each layer's bracket.
            seed: of the first checkpoint's start vectors.
        """
        from lipfast.estimators.tracker import Tracker  # noqa: PLC0415

        return Tracker(self, norm=norm, rtol=rtol, seed=seed)

    @overload
    def lower(
        self,
        state_dicts: StateDict,
        x: Tensor,
        *,
        norm: Norm = 2,
        per_sample: bool = False,
        memory: int = ...,
    ) -> LowerBound: ...
    @overload
    def lower(
        self,
        state_dicts: Sequence[StateDict],
        x: Tensor,
        *,
        norm: Norm = 2,
        per_sample: bool = False,
        memory: int = ...,
    ) -> list[LowerBound]: ...
    def lower(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        x: Tensor,
        *,
        norm: Norm = 2,
        per_sample: bool = False,
        memory: int = 1 << 30,
    ) -> LowerBound | list[LowerBound]:
        """Lower bounds from samples; see `estimators.sample_maximum.lower_bounds`.

        Args:
            state_dicts: one state dict, or a list of them.
            x: samples (B, D...), floating.
            norm: 1, 2 or inf.
            per_sample: keep the Jacobian norm of every sample.
            memory: bytes that intermediate tensors may take.

        Returns:
            One `LowerBound`, or a list in the order of the state dicts.

        Raises:
            ArgumentError, NonFiniteError: the samples do not fit, or hold NaN or Inf.
            StateDictError, NonFiniteError: a state dict does not fit the architecture.

        Examples:
            >>> import torch, lipfast
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
            >>> plan = lipfast.compile(model, torch.zeros(2, 2))
            >>> weights = {"0.weight": torch.tensor([[3.0, 0.0], [0.0, 4.0]])}
            >>> lower = plan.lower(weights, torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
            >>> round(lower.value, 6), lower.sample, lower.certified
            (4.0, 1, True)
        """
        from lipfast.estimators.sample_maximum import lower_bounds  # noqa: PLC0415

        results = lower_bounds(
            self, state_dicts, x, norm=norm, per_sample=per_sample, memory=memory
        )
        return results[0] if isinstance(state_dicts, Mapping) else results

    @overload
    def bounds(
        self,
        state_dicts: StateDict,
        x: Tensor,
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        per_sample: bool = False,
        memory: int = ...,
        domain: Domain | None = None,
    ) -> Bounds: ...
    @overload
    def bounds(
        self,
        state_dicts: Sequence[StateDict],
        x: Tensor,
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        per_sample: bool = False,
        memory: int = ...,
        domain: Domain | None = None,
    ) -> list[Bounds]: ...
    def bounds(
        self,
        state_dicts: StateDict | Sequence[StateDict],
        x: Tensor,
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        per_sample: bool = False,
        memory: int = 1 << 30,
        domain: Domain | None = None,
    ) -> Bounds | list[Bounds]:
        """Lower and upper bounds together, with lower <= upper asserted.

        Arguments, result order and errors as for `upper` and `lower`.

        Raises:
            BoundOrderError: a certified lower bound exceeds a certified upper bound (a defect).
        """
        from lipfast.estimators.estimate import joined  # noqa: PLC0415
        from lipfast.estimators.sample_maximum import lower_bounds  # noqa: PLC0415
        from lipfast.estimators.spectral_product import upper_bounds  # noqa: PLC0415

        uppers, _ = upper_bounds(self, state_dicts, norm=norm, rtol=rtol, seed=seed, domain=domain)
        lowers = lower_bounds(
            self, state_dicts, x, norm=norm, per_sample=per_sample, memory=memory, domain=domain
        )
        results = [joined(lower, upper) for lower, upper in zip(lowers, uppers, strict=True)]
        return results[0] if isinstance(state_dicts, Mapping) else results

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON (no weights)."""
        Path(path).write_text(json.dumps(self._to_json(), indent=1, allow_nan=False) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            TraceError: the file is missing, is not a plan, or has an unknown schema version.
            UnsupportedOpError: it needs rules that are not registered here.
        """
        try:
            value = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise TraceError(f"{path}: cannot read a plan: {error}") from error
        if not isinstance(value, dict) or "lipfast_plan" not in value:
            raise TraceError(f"{path}: not a lipfast plan")
        if value["lipfast_plan"] != SCHEMA_VERSION:
            raise TraceError(
                f"{path}: plan of schema version {value['lipfast_plan']}; this lipfast reads "
                f"version {SCHEMA_VERSION}. Trace the model again."
            )
        try:
            plan = _from_json(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TraceError(f"{path}: damaged plan: {error!r}") from error
        require_rules(plan.graph.nodes)
        return plan

    def _to_json(self) -> dict[str, Any]:
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
            "nodes": [node_to_json(node) for node in self.graph.nodes],
            "outputs": list(self.graph.outputs),
            # Left out where there is none, so that fingerprints of such plans stay as they were.
            **(
                {"computed": [node_to_json(node) for node in self.computed]}
                if self.computed
                else {}
            ),
        }

    def __repr__(self) -> str:
        entries = sum(_product(shape) for shape in self.parameters.values())
        head = (
            f"Plan({_shapes(self.input_shapes)} -> {_shapes(self.output_shapes)}, "
            f"{len(self.layers)} layers, {entries:,} parameters, {self.fingerprint[:8]}"
        )
        nodes = (*self.computed, *self.graph.nodes)
        return "\n".join([head, *(f"  {node}" for node in nodes), ")"])


def _referred(nodes: Iterable[Node]) -> list[str]:
    """Names of the parameters that nodes refer to, in order."""
    references = [reference for node in nodes for reference in node.references()]
    return [reference.name for reference in references if reference.kind == "parameter"]


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    return ", ".join("x".join(str(size) for size in shape) or "scalar" for shape in shapes)


def _from_json(value: Mapping[str, Any]) -> Plan:
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
    return Plan(
        Graph(tuple(node_from_json(node) for node in value["nodes"]), tuple(value["outputs"])),
        {name: tuple(shape) for name, shape in value["parameters"].items()},
        {name: tuple(others) for name, others in value["aliases"].items()},
        constants,
        dtype,
        tuple(node_from_json(node) for node in value.get("computed", ())),
    )
