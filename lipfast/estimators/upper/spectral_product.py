"""Upper bounds: one forward sweep over the graph with the certified norms of the layers.

Part of the proof: it says which graph and which norms are composed. `layer_norms` proves brackets
of layers, `sweep` what their composition bounds; `starts` and `layer_calls` are choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lipfast.estimators.domain import Domain
from lipfast.estimators.options import UpperMethod, check_flags, check_method
from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.composition import Composition
from lipfast.estimators.upper.interval_jacobian import interval_jacobians
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.layer_calls import FoundStarts, LayerCall, layer_brackets
from lipfast.estimators.upper.local.slopes import LocalSlopes
from lipfast.estimators.upper.many import Tighter, UpperBounds, UpperBoundsOfGraph
from lipfast.estimators.upper.networks import Group, prepared
from lipfast.estimators.upper.numbers_read import NumbersRead
from lipfast.estimators.upper.quadratic.bounds import quadratic_bounds, queued_bounds
from lipfast.estimators.upper.quadratic.certificate import Multipliers
from lipfast.estimators.upper.quadratic.rows import row_bounds
from lipfast.estimators.upper.starts import Starts, StartVectors, checked_starts
from lipfast.estimators.upper.sweep import Sweep, composed, sweep_of
from lipfast.estimators.upper.together import FEWEST, composed_together
from lipfast.norms import AnyNorm, Norm, check_norm
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_later
from lipfast.plan.stacked import ResolvedNetworks


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
    method: UpperMethod = "product",
    effort: int = 2,
    memory: int = 1 << 30,
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
        domain: the bound holds for pairs of inputs in this set only; products of activations may
            need one, and other activations have fewer slopes there (see `local.ranges`).
        method: "quadratic" also bounds by quadratic constraints, and takes the smaller bound (see
            `quadratic.bounds`; norms 1 and inf on a domain only, see `quadratic.rows`).
        effort: of its search, 1, 2 or 3.
        memory: bytes that matrices of quadratic constraints, and of slopes on a domain, may take.

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
        method=method,
        effort=effort,
        memory=memory,
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
    method: UpperMethod = "product",
    effort: int = 2,
    memory: int = 1 << 30,
    warm: Sequence[Multipliers | None] | None = None,
    follow: bool = True,
) -> UpperBounds:
    """`product_bounds` in arrays: for callers that need no `UpperBound` of every network.

    Arguments, values and errors are those of `product_bounds`; `state_dicts` may be stacked
    (`lipfast.plan.stacked.StackedStateDicts`). `warm` are `UpperBounds.warm_start` of similar
    networks, None where there are none; `follow` says that those are just before in their runs.
    """
    check_flags(simplify=simplify)
    resolved = resolve_later(plan, state_dicts)
    begin = checked_starts(plan, start, len(resolved.networks))
    quadratic = None
    if check_method(method, effort, check_norm(norm), domain):
        quadratic = _Quadratic(effort, warm or [None] * len(resolved.networks), follow)
    call = _Call(plan, check_norm(norm), rtol, seed, begin, domain, simplify, memory, quadratic)
    parts: list[UpperBoundsOfGraph] | None = None
    try:
        parts = call.bounds(resolved.networks)
    except Exception:  # perhaps of numbers that nothing should be made of
        if resolved.hold():
            raise
    if parts is None or not resolved.hold():
        parts = call.bounds(resolved.settled())
    count = len(resolved.networks)
    return UpperBounds(call.norm, count, parts, plan.rules_given, denormals_flushed())


class _Quadratic(NamedTuple):
    """What quadratic constraints are asked for with."""

    effort: int
    warm: Sequence[Multipliers | None]
    follow: bool


class _Call(NamedTuple):
    """What `product_bounds` was asked for."""

    plan: Architecture
    norm: Norm
    rtol: float
    seed: int
    start: Sequence[StartVectors]
    domain: Domain | None
    simplify: bool
    memory: int
    quadratic: _Quadratic | None

    def bounds(self, networks: ResolvedNetworks) -> list[UpperBoundsOfGraph]:
        """Bounds of networks that are right, by the graphs that they are bounded by."""
        groups = prepared(self.plan, networks, simplify=self.simplify)
        parts: list[UpperBoundsOfGraph] = []
        failure: Exception | None = None
        try:
            parts = [self._bounds_of(group) for group in groups]
        except Exception as error:  # perhaps of numbers of networks that the graph is wrong for
            failure = error
        # What has come from a device since says whether networks were bounded by the right graph.
        apart = [index for group in groups for index in group.doubtful()]
        if apart:
            groups = prepared(self.plan, networks, simplify=self.simplify, apart=apart)
            return [self._bounds_of(group) for group in groups]
        if failure is not None:
            raise failure
        return parts

    def _bounds_of(self, group: Group) -> UpperBoundsOfGraph:
        plan, parameters = self.plan, group.parameters
        sweep = sweep_of(plan, group.folded)
        numbers = NumbersRead(plan, sweep, parameters, self.norm, self.domain)
        own = [self.start[index] for index in group.networks]
        later = None
        queued = None
        local = LocalSlopes(plan, parameters, self.domain, self.memory)
        if self.quadratic is not None and self.norm == 2:
            # Before the host waits for the norms.
            begin = [self.quadratic.warm[index] for index in group.networks]
            queued = queued_bounds(
                plan,
                sweep,
                parameters,
                effort=self.quadratic.effort,
                start=begin,
                memory=self.memory,
            )
        if self.norm != 2 and self.simplify:
            later = interval_jacobians(plan, sweep, parameters, self.norm, local)
        found: tuple[LayerBrackets, Sequence[StartVectors]]
        if later is not None and later.brackets is not None:
            found = later.brackets, FoundStarts(len(own))
        else:
            call = LayerCall(sweep.layers, parameters, self.norm, self.rtol, self.seed, own)
            found = layer_brackets(call)
        bounds = _bounds_of_group(plan, sweep, group, found, numbers, norm=self.norm)
        if later is not None:
            bounds = replace(bounds, tighter=[later.read()])
        if queued is not None:
            return replace(bounds, tighter=[self._of_domain(queued())])
        if self.quadratic is None:
            return bounds
        effort, warm, follow = self.quadratic
        slopes = local.of_all if local.known else None
        if self.norm != 2:
            own_norm = row_bounds(plan, sweep, parameters, self.norm, effort=effort, slopes=slopes)
            return replace(bounds, tighter=[*bounds.tighter, own_norm])
        tighter = quadratic_bounds(
            plan,
            sweep,
            parameters,
            effort=effort,
            start=[warm[index] for index in group.networks],
            follow=follow,
            memory=self.memory,
            slopes=slopes,
        )
        return replace(bounds, tighter=[self._of_domain(tighter)])

    def _of_domain(self, tighter: Tighter | str) -> Tighter | str:
        """On a domain no bound has a certificate, also where the domain says nothing of slopes."""
        if self.domain is None or isinstance(tighter, str):
            return tighter
        return replace(tighter, certificate=None)


def _bounds_of_group(
    plan: Architecture,
    sweep: Sweep,
    group: Group,
    found: tuple[LayerBrackets, Sequence[StartVectors]],
    numbers: NumbersRead,
    *,
    norm: Norm,
) -> UpperBoundsOfGraph:
    brackets, starts = found
    parameters, sizes = numbers.parameters(), numbers.sizes()
    of: Callable[[int], Composition]
    if len(parameters) >= FEWEST and not sweep.needs_sizes:
        together = composed_together(plan, sweep, parameters, brackets.upper, norm=norm)
        total, of, reasons = together.total, together.of, together.reasons
        values, logs = total.value.tolist(), total.log.tolist()
        unbounded = total.unbounded.tolist()
    else:
        pairs = [
            composed(plan, sweep, *entry, norm=norm, sizes=own)
            for *entry, own in zip(parameters, brackets.upper.tolist(), sizes, strict=True)
        ]
        of, reasons = [pair[0] for pair in pairs].__getitem__, [pair[1] for pair in pairs]
        totals = [pair[0].total for pair in pairs]
        values, logs = [total.value for total in totals], [total.log for total in totals]
        unbounded = [total.unbounded for total in totals]
    why = [_why_infinite(*found) for found in zip(values, unbounded, reasons, strict=True)]
    return UpperBoundsOfGraph(group.networks, brackets, starts, of, values, logs, why)


def _why_infinite(value: float, unbounded: bool, reasons: Sequence[str]) -> str | None:
    if unbounded:
        return "; ".join(dict.fromkeys(reasons)) or "a layer's norm is unbounded"
    if math.isinf(value):
        return "the bound is finite but exceeds float64: see log_value"
    return None
