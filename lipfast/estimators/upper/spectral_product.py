"""Upper bounds: one forward sweep over the graph with the certified norms of the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError, naming
from lipfast.estimators.domain import Domain
from lipfast.estimators.estimate import LayerBracket, UpperBound
from lipfast.estimators.upper.composition import Composition, Operation
from lipfast.estimators.upper.convolution_norms import (
    ConvolutionStart,
    convolution_brackets,
    holder_bound,
)
from lipfast.estimators.upper.sizes import Sizes
from lipfast.graph.nodes import Node, Reference, computed_name, error_name
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.spectral_norms import spectral_norms
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_all
from lipfast.plan.fold import FoldedGraph, fold_roundings, folded_name
from lipfast.plan.layers import Layer
from lipfast.plan.matrix_errors import frobenius_norm
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Call, Norm, Rule, check_norm, lookup
from lipfast.rules.upward import Upward, p_norm

_METHODS = {1: "product of column-sum norms", 2: "product of certified spectral norms"}


Vectors = Mapping[str, Tensor | ConvolutionStart]
"""Name of a layer's weight -> right singular vector (columns,), or a convolution's start."""
Starts = Vectors | Sequence[Vectors | None] | None


def upper_bounds(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    *,
    norm: Norm = 2,
    rtol: float = 1e-6,
    seed: int = 0,
    start: Starts = None,
    simplify: bool = True,
    domain: Domain | None = None,
) -> tuple[list[UpperBound], list[Vectors]]:
    """Upper bounds on the Lipschitz constants of many networks of one architecture.

    For a chain this is the product of the layers' operator norms and the activations' constants,
    ``L <= prod_l ||W_l|| prod_l sup |phi_l'|`` (Szegedy et al., 2014); sums of branches add.
    Every operation after the certified norms is rounded up.

    Args:
        plan: the architecture.
        state_dicts: one or many.
        norm: 1, 2 or inf.
        rtol: relative gap of each layer's bracket.
        seed: of the start vectors.
        start: start vectors by the name of the weight, where there are some: one mapping for all
            state dicts, or a list with one (or None) for each. Whether a bound is proved does not
            depend on them.
        simplify: fold BatchNorm into its neighbours; otherwise layer by layer, as published.
        domain: the bound holds for inputs in this set only; products of activations may need one.

    Returns:
        One `UpperBound` per state dict, and the vectors with which to start at similar weights
        (empty for norms 1 and inf, which take none). A product beyond float64 has the value inf, a
        finite `log_value` and a `reason`.

    Raises:
        StateDictError, NonFiniteError: a state dict does not fit the architecture.
        ArgumentError: start vectors do not fit the architecture or the number of state dicts.
    """
    with plain_arithmetic():
        tensors = resolve_all(plan, state_dicts)
        starts = _starts(plan, start, len(tensors))
        return _upper_bounds(
            plan,
            tensors,
            starts,
            norm=check_norm(norm),
            rtol=rtol,
            seed=seed,
            simplify=simplify,
            domain=domain,
        )


def _upper_bounds(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    starts: Sequence[Vectors],
    *,
    norm: Norm,
    rtol: float,
    seed: int,
    simplify: bool,
    domain: Domain | None,
) -> tuple[list[UpperBound], list[Vectors]]:
    """The same, of checked arguments."""
    prepared = [
        _prepared(plan, entry, f"state dict {index}: ", simplify=simplify)
        for index, entry in enumerate(tensors)
    ]
    found: dict[int, UpperBound] = {}
    vectors: list[Vectors] = [{} for _ in tensors]
    for merged in (True, False):
        chosen = [index for index, entry in enumerate(prepared) if bool(entry[0].merged) is merged]
        if not chosen:
            continue
        folded, parameters = prepared[chosen[0]][0], [prepared[index][1] for index in chosen]
        layers_of_plan = plan.layers if folded is plan.folded else plan.layers_of(folded)
        brackets, right = layer_brackets(
            layers_of_plan,
            parameters,
            norm=norm,
            rtol=rtol,
            seed=seed,
            start=[starts[index] for index in chosen],
        )
        steps = steps_of(plan, folded, layers_of_plan)
        for position, index in enumerate(chosen):
            vectors[index] = right[position]
            found[index] = _compose(
                plan, steps, parameters[position], brackets[position], norm=norm, domain=domain
            )
    results = [found[index] for index in range(len(tensors))]
    if denormals_flushed():
        reasons = [
            f"{result.reason}; {FLUSHED}" if result.reason else FLUSHED for result in results
        ]
        results = [
            replace(result, certified=False, reason=reason)
            for result, reason in zip(results, reasons, strict=True)
        ]
    return results, vectors


def _prepared(
    plan: Architecture, entry: Mapping[str, Tensor], where: str, *, simplify: bool
) -> tuple[FoldedGraph, Mapping[str, Tensor]]:
    """The graph for one state dict, and its parameters with those that are new in the graph.

    Affine maps whose product leaves the range of float64, or is mostly rounding, are not merged.
    """
    folded = plan.folded if simplify else FoldedGraph(plan.graph, {})
    if folded.merged:
        try:
            parameters = {**entry, **folded.parameters(entry, plan.constants, where)}
        except NonFiniteError:
            folded = plan.unmerged
        else:
            if all(_accurate(parameters, computed_name(node.name)) for node in folded.merged):
                return folded, parameters
            folded = plan.unmerged
    if not folded.maps:
        return folded, entry
    return folded, {**entry, **folded.parameters(entry, plan.constants, where)}


def _accurate(parameters: Mapping[str, Tensor], name: str) -> bool:
    """Whether the rounding of a merged matrix is far below its entries; biases do not matter."""
    weight, error = parameters[name], parameters.get(error_name(name))
    if weight.dim() < 2 or error is None or error.numel() == 0:
        return True
    return float(error.max()) <= 1e-9 * float(weight.abs().max())


def _starts(plan: Architecture, start: Starts, count: int) -> list[Vectors]:
    """One mapping per state dict, perhaps empty; names checked, shapes are the op's to check."""
    if start is None or isinstance(start, Mapping):
        starts: list[Vectors] = [start or {}] * count
    else:
        starts = [entry or {} for entry in start]
    if len(starts) != count:
        raise ArgumentError(f"start: {len(starts)} mappings for {count} state dicts")
    names = {layer.parameter for layer in plan.layers}
    if plan.folded.merged:
        names |= {layer.parameter for layer in plan.layers_of(plan.unmerged)}
    for entry in starts:
        unknown = [name for name in entry if name not in names]
        if unknown:
            raise ArgumentError(
                f"start: '{unknown[0]}' is not the weight of a layer; those are "
                f"{', '.join(sorted(names))}"
            )
    return starts


def layer_brackets(
    layers: Sequence[Layer],
    tensors: Sequence[Mapping[str, Tensor]],
    *,
    norm: Norm,
    rtol: float,
    seed: int,
    start: Sequence[Vectors],
) -> tuple[list[tuple[LayerBracket, ...]], list[Vectors]]:
    """Brackets of all layers of all networks: few native calls, whatever the number of either.

    Also what to start from at similar weights, for each network by the name of the weight.
    """
    found: dict[tuple[int, int], LayerBracket] = {}
    vectors: list[dict[str, Tensor | ConvolutionStart]] = [{} for _ in tensors]
    for transposed in (False, True):
        chosen = [
            layer
            for layer in layers
            if layer.convolution is None and (layer.transposed and norm != 2) is transposed
        ]
        matrices = [_native(entry[layer.weight]) for entry in tensors for layer in chosen]
        if not matrices:
            continue
        effective = {1: math.inf, math.inf: 1}.get(norm, norm) if transposed else norm
        names = [layer.parameter for layer in chosen]
        starts = [_vector(entry, name) for entry in start for name in names] if any(start) else None
        result = spectral_norms(matrices, norm=effective, rtol=rtol, seed=seed, start=starts)
        columns = zip(
            result.lower.tolist(),
            result.upper.tolist(),
            result.certified.tolist(),
            result.passes.tolist(),
            strict=True,
        )
        for position, values in enumerate(columns):
            network, layer = position // len(chosen), chosen[position % len(chosen)]
            error = _fold_error(layer, matrices[position], tensors[network], norm)
            error += _computed_error(layer, tensors[network], norm)
            found[network, layer.index] = _bracket(layer, values, result.method[position], error)
            if norm == 2:
                vectors[network][layer.parameter] = result.right[position]
    _add_convolutions(found, vectors, layers, tensors, norm=norm, rtol=rtol, seed=seed, start=start)
    brackets = [
        tuple(found[network, layer.index] for layer in layers) for network in range(len(tensors))
    ]
    return brackets, list(vectors)


def _vector(start: Vectors, name: str) -> Tensor | None:
    """The start vector of a matrix."""
    entry = start.get(name)
    if entry is not None and not isinstance(entry, Tensor):
        raise ArgumentError(f"start: '{name}' is a matrix: expected a vector, got a convolution's")
    return entry


def _add_convolutions(
    found: dict[tuple[int, int], LayerBracket],
    vectors: Sequence[dict[str, Tensor | ConvolutionStart]],
    layers: Sequence[Layer],
    tensors: Sequence[Mapping[str, Tensor]],
    *,
    norm: Norm,
    rtol: float,
    seed: int,
    start: Sequence[Vectors],
) -> None:
    """Brackets of the convolutions, into `found`, and what they may start from, into `vectors`."""
    chosen = [
        (network, layer)
        for network in range(len(tensors))
        for layer in layers
        if layer.convolution is not None
    ]
    weights = [tensors[network][layer.weight] for network, layer in chosen]
    results = convolution_brackets(
        [layer for _, layer in chosen],
        weights,
        norm,
        rtol=rtol,
        seed=seed,
        start=[start[network].get(layer.parameter) for network, layer in chosen],
    )
    for (network, layer), weight, result in zip(chosen, weights, results, strict=True):
        error = 0.0
        if layer.folds:
            size = holder_bound(layer, weight) if norm == 2 else result.upper
            error = _widened_fold(layer, size, weight, tensors[network])
        rounding = tensors[network].get(error_name(layer.weight))
        if rounding is not None:
            size = holder_bound(layer, rounding)
            error += size if norm == 2 else _entrywise(layer, rounding, norm)
        values = (result.lower, result.upper, result.certified, result.passes)
        found[network, layer.index] = _bracket(layer, values, result.method, error)
        if result.start is not None:
            vectors[network][layer.parameter] = result.start


def _fold_error(layer: Layer, matrix: Tensor, tensors: Mapping[str, Tensor], norm: Norm) -> float:
    """Norm of the difference between a folded matrix in real arithmetic and the stored one.

    ``|E| <= eps |W| + t`` with a number t, so ``||E||_2 <= eps ||W||_F + t n`` over n entries, and
    ``||E||_p <= eps || |W| ||_p + t n``.
    """
    if not layer.folds:
        return 0.0
    size = _norm_of_magnitudes(layer, matrix.double(), norm)
    return _widened_fold(layer, size, matrix, tensors)


def _widened_fold(
    layer: Layer, size: float, weight: Tensor, tensors: Mapping[str, Tensor]
) -> float:
    """``eps size + t n``: no row or column of an operator holds an entry of its weight twice."""
    room = float(tensors[folded_name(layer.node, "underflow")]) * weight.numel()
    return fold_roundings(layer.folds) * size + room * (1.0 + 2.0**-40)


def _norm_of_magnitudes(layer: Layer, matrix: Tensor, norm: Norm) -> float:
    """``|| |M| ||`` of a layer's operator, rounded up; the Frobenius norm for 2."""
    if norm == 2:
        return frobenius_norm(matrix)
    rows = math.isinf(norm) is not layer.transposed  # whether sums run along the rows
    sums = matrix.abs().sum(-1 if rows else 0)
    return float(sums.max()) * (1.0 + 2.0**-30) if sums.numel() else 0.0


def _entrywise(layer: Layer, rounding: Tensor, norm: Norm) -> float:
    """Norm 1 or inf of the convolution with a kernel of error bounds."""
    (result,) = convolution_brackets([layer], [rounding], norm)
    return result.upper


def _computed_error(layer: Layer, tensors: Mapping[str, Tensor], norm: Norm) -> float:
    """Norm of the rounding errors of a matrix that is computed from parameters: ||E||_F for 2."""
    rounding = tensors.get(error_name(layer.weight))
    if rounding is None:
        return 0.0
    size = _norm_of_magnitudes(layer, rounding, norm)
    return size * (1.0 + 2.0**-30) + 2.0**-900


def _native(weight: Tensor) -> Tensor:
    """Give the weight a dtype of the native op: half precision and integers widen exactly."""
    weight = weight.detach()
    if not weight.is_floating_point():
        return weight.double()
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _bracket(
    layer: Layer, values: tuple[float, float, bool, int], method: str, error: float
) -> LayerBracket:
    lower, upper, certified, passes = values
    if error > 0.0:
        lower = max(0.0, math.nextafter(lower - error, 0.0))
        upper = math.nextafter(upper + error, math.inf)
    return LayerBracket(
        index=layer.index,
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        lower=lower,
        upper=upper,
        certified=certified,
        method=method,
        passes=passes,
    )


class Step:
    """One node with its rule and operands, resolved once for all state dicts."""

    def __init__(
        self,
        plan: Architecture,
        node: Node,
        shapes: Mapping[str, tuple[int, ...]],
        layers: Mapping[str, int],
    ) -> None:
        self.node = node
        self.rule: Rule = lookup(node.op)
        self.layer = layers.get(node.name)
        self.references = references = [
            ref for ref in node.references() if ref.kind in ("node", "parameter", "constant")
        ]
        self.names = [ref.name if ref.kind == "node" else None for ref in references]
        operands = tuple(dict.fromkeys(name for name in self.names if name is not None))
        self.operation = Operation(node.name, node.op, node.module, operands, self.layer)
        self.operand_shapes = [self._shape(plan, ref, shapes) for ref in references]

    @staticmethod
    def _shape(
        plan: Architecture, reference: Reference, shapes: Mapping[str, tuple[int, ...]]
    ) -> tuple[int, ...]:
        if reference.kind == "node":
            return shapes[reference.name]
        if reference.kind == "parameter":
            # What BatchNorms make of a weight is not in the state dict; no rule asks for its shape.
            return plan.shapes.get(reference.name, ())
        return plan.constants[reference.name].shape


def steps_of(plan: Architecture, folded: FoldedGraph, layers: Sequence[Layer]) -> list[Step]:
    """Every node but the inputs, in order."""
    shapes = {node.name: node.shape for node in folded.graph.nodes}
    positions = {layer.node: layer.index for layer in layers}
    return [
        Step(plan, node, shapes, positions) for node in folded.graph.nodes if node.op != "input"
    ]


_ZERO = Upward.of(0.0)
_ONE = Upward.of(1.0)


def _compose(
    plan: Architecture,
    steps: Sequence[Step],
    parameters: Mapping[str, Tensor],
    layers: tuple[LayerBracket, ...],
    *,
    norm: Norm,
    domain: Domain | None,
) -> UpperBound:
    """Carry ``L(node)`` through the graph, and magnitudes where a product needs them."""
    constants = {node.name: _ONE for node in plan.graph.inputs}
    sizes = _sizes(plan, steps, parameters, norm, domain)
    reasons: list[str] = []
    contributions: dict[str, Mapping[str, Upward]] = {}
    for step in steps:
        call = Call(
            node=step.node,
            norm=norm,
            operands=[_ZERO if name is None else constants[name] for name in step.names],
            operand_shapes=step.operand_shapes,
            layer=0.0 if step.layer is None else layers[step.layer].upper,
            parameters=parameters,
            constants=plan.constants,
        )
        if sizes is not None:
            call.magnitudes = [sizes.of(reference, parameters) for reference in step.references]
        with naming(step.node.op, step.node.module):
            result = step.rule.bound(call)
            constants[step.node.name] = result if isinstance(result, Upward) else Upward.of(result)
            if sizes is not None:
                own = Magnitude() if step.rule.magnitude is None else step.rule.magnitude(call)
                sizes.add(step.node, constants[step.node.name], own)
        if call.reason is not None:
            reasons.append(f"{call.reason} (module '{step.node.module}')")
        if len(step.operation.operands) > 1:
            contributions[step.node.name] = _alone(step, call, constants)
    total = p_norm([constants[name] for name in plan.graph.outputs], norm)
    inputs = [Operation(node.name, "input", node.module, ()) for node in plan.graph.inputs]
    operations = [*inputs, *(step.operation for step in steps)]
    composed = Composition(operations, constants, contributions, plan.graph.outputs, total)
    return replace(_upper_bound(total, layers, norm, reasons), composition=composed)


def _alone(step: Step, call: Call, constants: Mapping[str, Upward]) -> dict[str, Upward]:
    """What the node makes of each of its operands if only that one varies."""
    found = {}
    for operand in step.operation.operands:
        only = [constants[name] if name == operand else _ZERO for name in step.names]
        result = step.rule.bound(replace(call, operands=only))
        found[operand] = result if isinstance(result, Upward) else Upward.of(result)
    return found


def _sizes(
    plan: Architecture,
    steps: Sequence[Step],
    parameters: Mapping[str, Tensor],
    norm: Norm,
    domain: Domain | None,
) -> Sizes | None:
    """Magnitudes of the inputs, if any product asks for some."""
    if not any(step.rule.product is not None and step.rule.product(step.node) for step in steps):
        return None
    return Sizes(plan, parameters, norm, domain)


def _upper_bound(
    total: Upward, layers: tuple[LayerBracket, ...], norm: Norm, reasons: list[str]
) -> UpperBound:
    doubtful = [str(layer.index) for layer in layers if not layer.certified]
    value = total.value
    reason: str | None = None
    if total.unbounded:
        reason = "; ".join(dict.fromkeys(reasons)) or "a layer's norm is unbounded"
    elif math.isinf(value):
        reason = "the bound is finite but exceeds float64: see log_value"
    if doubtful:
        note = f"the norms of layers {', '.join(doubtful)} are not certified"
        reason = f"{reason}; {note}" if reason else note
    return UpperBound(
        value=value,
        log_value=total.log,
        side="upper",
        norm=norm,
        method=_METHODS.get(int(norm) if norm != math.inf else 0, "product of row-sum norms"),
        certified=not doubtful,
        reason=reason,
        layers=layers,
    )
