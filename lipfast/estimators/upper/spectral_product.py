"""Upper bounds: one forward sweep over the graph with the certified norms of the layers.

Part of the proof: it says which graph and which norms are composed. `layer_norms` proves brackets
of layers, `sweep` what their composition bounds; `starts` and `layer_calls` are choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.estimators.domain import Domain
from lipfast.estimators.options import check_flags
from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.composition import Composition
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.layer_calls import LayerCall, layer_brackets
from lipfast.estimators.upper.sizes import Sizes
from lipfast.estimators.upper.starts import Starts, StartVectors, checked_starts
from lipfast.estimators.upper.sweep import composed, sweep_of
from lipfast.graph.nodes import computed_name, error_name
from lipfast.norms import AnyNorm, Norm, check_norm
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_all
from lipfast.plan.fold import FoldedGraph

_METHOD_OF_NORM = {
    1: "product of column-sum norms",
    2: "product of certified spectral norms",
    math.inf: "product of row-sum norms",
}


@plain_arithmetic()
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
) -> tuple[list[UpperBound], list[StartVectors]]:
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
    check_flags(simplify=simplify)
    tensors = resolve_all(plan, state_dicts)
    starts = checked_starts(plan, start, len(tensors))
    norm = check_norm(norm)
    prepared = [
        _prepared(plan, entry, f"state dict {index}: ", simplify=simplify)
        for index, entry in enumerate(tensors)
    ]
    found: dict[int, UpperBound] = {}
    vectors: list[StartVectors] = [{} for _ in tensors]
    for merged in (True, False):
        chosen = [index for index, entry in enumerate(prepared) if bool(entry[0].merged) is merged]
        if not chosen:
            continue
        parameters = [prepared[index][1] for index in chosen]
        sweep = sweep_of(plan, prepared[chosen[0]][0])
        own_starts = [starts[index] for index in chosen]
        call = LayerCall(sweep.layers, parameters, norm, rtol, seed, own_starts)
        brackets, right = layer_brackets(call)
        for index, entry, layers, own in zip(chosen, parameters, brackets, right, strict=True):
            vectors[index] = own
            sizes = Sizes(plan, entry, norm, domain) if sweep.needs_sizes else None
            uppers = [layer.upper for layer in layers]
            composition, reasons = composed(plan, sweep, entry, uppers, norm=norm, sizes=sizes)
            found[index] = _result(composition, layers, norm, reasons, plan.rules_given)
    results = [found[index] for index in range(len(tensors))]
    if denormals_flushed():
        notes = [f"{entry.reason}; {FLUSHED}" if entry.reason else FLUSHED for entry in results]
        pairs = zip(results, notes, strict=True)
        results = [replace(entry, certified=False, reason=note) for entry, note in pairs]
    return results, vectors


def _prepared(
    plan: Architecture, entry: Mapping[str, Tensor], where: str, *, simplify: bool
) -> tuple[FoldedGraph, Mapping[str, Tensor]]:
    """The graph for one state dict, and its parameters with those that are new in the graph.

    Affine maps whose product leaves the range of float64, or is mostly rounding, are not merged.
    """
    folded = plan.folded if simplify else plan.joined
    if folded.merged:
        with suppress(NonFiniteError):
            parameters = {**entry, **folded.parameters(entry, plan.constants, where)}
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


def _result(
    composition: Composition,
    layers: tuple[LayerBracket, ...],
    norm: Norm,
    reasons: list[str],
    given: tuple[str, ...],
) -> UpperBound:
    total = composition.total
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
        method=_METHOD_OF_NORM[norm],
        certified=not doubtful,
        reason=reason,
        layers=layers,
        composition=composition,
        given=given,
    )
