"""Upper bounds: one forward sweep over the graph with the certified norms of the layers.

Part of the proof: it says which graph and which norms are composed. `layer_norms` proves brackets
of layers, `sweep` what their composition bounds; `starts` and `layer_calls` are choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.estimators.domain import Domain
from lipfast.estimators.options import check_flags
from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.composition import Composition
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.layer_calls import LayerCall, layer_brackets
from lipfast.estimators.upper.many import UpperBounds, UpperBoundsOfGraph
from lipfast.estimators.upper.sizes import Sizes
from lipfast.estimators.upper.starts import Starts, StartVectors, checked_starts
from lipfast.estimators.upper.sweep import Sweep, composed, sweep_of
from lipfast.estimators.upper.together import FEWEST, composed_together
from lipfast.graph.nodes import computed_name, error_name
from lipfast.norms import AnyNorm, Norm, check_norm
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_all
from lipfast.plan.fold import FoldedGraph, folded_together


def product_bounds(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    *,
    norm: AnyNorm = 2,
    rtol: float = 1e-6,
    seed: int = 0,
    start: Starts = None,
    simplify: bool = True,
    domain: Domain | None = None,
) -> tuple[list[UpperBound], Sequence[StartVectors]]:
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
    found = upper_bounds_together(
        plan,
        state_dicts,
        norm=norm,
        rtol=rtol,
        seed=seed,
        start=start,
        simplify=simplify,
        domain=domain,
    )
    return [found.of(network) for network in range(len(found))], found.starts


@plain_arithmetic()
def upper_bounds_together(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    *,
    norm: AnyNorm = 2,
    rtol: float = 1e-6,
    seed: int = 0,
    start: Starts = None,
    simplify: bool = True,
    domain: Domain | None = None,
) -> UpperBounds:
    """`product_bounds` in arrays: for callers that need no `UpperBound` of every network.

    Arguments, values and errors are those of `product_bounds`; `state_dicts` may be stacked
    (`lipfast.plan.stacked.StackedStateDicts`).
    """
    check_flags(simplify=simplify)
    tensors = resolve_all(plan, state_dicts)
    begin = checked_starts(plan, start, len(tensors))
    norm = check_norm(norm)
    parts = []
    for group in _prepared(plan, tensors, simplify=simplify):
        sweep = sweep_of(plan, group.folded)
        own = [begin[index] for index in group.networks]
        found = layer_brackets(LayerCall(sweep.layers, group.parameters, norm, rtol, seed, own))
        parts.append(_bounds_of_group(plan, sweep, group, found, norm=norm, domain=domain))
    return UpperBounds(norm, len(tensors), parts, plan.rules_given, denormals_flushed())


class _Group(NamedTuple):
    """Networks that are bounded by one graph.

    Attributes:
        folded: the graph.
        networks: which of all.
        parameters: theirs, with those that are new in the graph.
    """

    folded: FoldedGraph
    networks: Sequence[int]
    parameters: Sequence[Mapping[str, Tensor]]


def _bounds_of_group(
    plan: Architecture,
    sweep: Sweep,
    group: _Group,
    found: tuple[LayerBrackets, Sequence[StartVectors]],
    *,
    norm: Norm,
    domain: Domain | None,
) -> UpperBoundsOfGraph:
    (brackets, starts), parameters = found, group.parameters
    if not sweep.needs_sizes:
        parameters = _as_rules_read(sweep, parameters)
    of: Callable[[int], Composition]
    if len(parameters) >= FEWEST and not sweep.needs_sizes:
        together = composed_together(plan, sweep, parameters, brackets.upper, norm=norm)
        total, of, reasons = together.total, together.of, together.reasons
        values, logs = total.value.tolist(), total.log.tolist()
        unbounded = total.unbounded.tolist()
    else:
        pairs = []
        for entry, uppers in zip(parameters, brackets.upper.tolist(), strict=True):
            sizes = Sizes(plan, entry, norm, domain) if sweep.needs_sizes else None
            pairs.append(composed(plan, sweep, entry, uppers, norm=norm, sizes=sizes))
        of, reasons = [pair[0] for pair in pairs].__getitem__, [pair[1] for pair in pairs]
        totals = [pair[0].total for pair in pairs]
        values, logs = [total.value for total in totals], [total.log for total in totals]
        unbounded = [total.unbounded for total in totals]
    why = [_why_infinite(*found) for found in zip(values, unbounded, reasons, strict=True)]
    return UpperBoundsOfGraph(group.networks, brackets, starts, of, values, logs, why)


def _as_rules_read(
    sweep: Sweep, parameters: Sequence[Mapping[str, Tensor]]
) -> Sequence[Mapping[str, Tensor]]:
    """Parameters as rules read them: from a device in one copy, not number by number."""
    names = [
        name
        for step in sweep.steps
        if step.operation.layer is None
        for reference in step.references
        if reference.kind == "parameter"
        for name in (reference.name, error_name(reference.name))
    ]
    read = [
        (entry, name)
        for entry in parameters
        for name in names
        if name in entry and entry[name].is_floating_point() and not entry[name].is_cpu
    ]
    if not read:
        return parameters
    tensors = [entry[name].detach() for entry, name in read]
    together = torch.cat([tensor.double().flatten() for tensor in tensors]).cpu()
    pieces = torch.split(together, [tensor.numel() for tensor in tensors])
    copies: dict[int, dict[str, Tensor]] = {}
    for (entry, name), tensor, piece in zip(read, tensors, pieces, strict=True):
        own = piece.to(tensor.dtype).reshape(tensor.shape)
        copies.setdefault(id(entry), {})[name] = own
    return [{**entry, **copies.get(id(entry), {})} for entry in parameters]


def _why_infinite(value: float, unbounded: bool, reasons: Sequence[str]) -> str | None:
    if unbounded:
        return "; ".join(dict.fromkeys(reasons)) or "a layer's norm is unbounded"
    if math.isinf(value):
        return "the bound is finite but exceeds float64: see log_value"
    return None


def _prepared(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], *, simplify: bool
) -> list[_Group]:
    """The graphs for all networks.

    Affine maps whose product leaves the range of float64, or is mostly rounding, are not merged.
    """
    folded = plan.folded if simplify else plan.joined
    indices = list(range(len(tensors)))
    if not folded.merged:
        whole = _Group(folded, indices, _folded(plan, folded, tensors))
        return [whole] if tensors else []
    merged: list[Mapping[str, Tensor]] = []
    apart: list[int] = []
    for index, entry in enumerate(tensors):
        own = _with_merged_maps(plan, folded, entry)
        if own is None:
            apart.append(index)
        else:
            merged.append(own)
    found: list[_Group] = []
    if merged:
        together = [index for index in indices if index not in set(apart)]
        found.append(_Group(folded, together, merged))
    if apart:
        others = [tensors[index] for index in apart]
        parameters = _folded(plan, plan.unmerged, others, apart)
        found.append(_Group(plan.unmerged, apart, parameters))
    return found


def _folded(
    plan: Architecture,
    folded: FoldedGraph,
    tensors: Sequence[Mapping[str, Tensor]],
    indices: Sequence[int] | None = None,
) -> list[Mapping[str, Tensor]]:
    if not folded.maps:
        return list(tensors)
    together = folded_together(folded.maps, tensors, plan.constants)
    if together is not None:
        return [{**entry, **own} for entry, own in zip(tensors, together, strict=True)]
    wheres = [f"state dict {index}: " for index in indices or range(len(tensors))]
    return [
        {**entry, **folded.parameters(entry, plan.constants, where)}
        for entry, where in zip(tensors, wheres, strict=True)
    ]


def _with_merged_maps(
    plan: Architecture, folded: FoldedGraph, entry: Mapping[str, Tensor]
) -> Mapping[str, Tensor] | None:
    """The parameters of a graph with merged maps; None where they are not to be merged."""
    with suppress(NonFiniteError):
        parameters = {**entry, **folded.parameters(entry, plan.constants)}
        if all(_accurate(parameters, computed_name(node.name)) for node in folded.merged):
            return parameters
    return None


def _accurate(parameters: Mapping[str, Tensor], name: str) -> bool:
    """Whether the rounding of a merged matrix is far below its entries; biases do not matter."""
    weight, error = parameters[name], parameters.get(error_name(name))
    if weight.dim() < 2 or error is None or error.numel() == 0:
        return True
    return float(error.max()) <= 1e-9 * float(weight.abs().max())
