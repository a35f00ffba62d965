"""Floors of networks: patterns are searched for, and the norms of their Jacobians proved.

Part of the proof of every floor. For a stored direction v and stored slopes the linear graph is
evaluated with a bound of its rounding, entry by entry (and in norm, for deep networks), and
``||J v|| / ||v||`` rounded down: what makes certified difference quotients, between 0 and v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.estimators.enclosure import enclose_nodes
from lipfast.estimators.estimate import log_down
from lipfast.estimators.floor.result import Floor, no_floor
from lipfast.estimators.floor.search import (
    BestPatterns,
    PatternSearch,
    networks_at_once,
    pattern_search,
)
from lipfast.estimators.lower.quotients import differences, quotients
from lipfast.estimators.lower.secants import certified_quotient
from lipfast.estimators.progress import shown_progress
from lipfast.norms import Norm
from lipfast.ops.denormals import FLUSHED, denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.interpret import joined_outputs

_NOTHING = "every pattern's Jacobian is zero, or nothing could be proved in float64"
# Shares of what holds without errors; below, they are bounded in norm as well.
_NEARLY_ALL = 0.999


def floors(
    plan: Architecture,
    networks: Sequence[Mapping[str, Tensor]],
    *,
    norm: Norm,
    effort: int,
    seed: int,
    memory: int = 1 << 30,
    progress: bool | None = None,
    points: Tensor | None = None,
) -> list[Floor]:
    """The floor of each network; see `Floor`.

    Args:
        plan: the architecture.
        networks: checked parameters of each network.
        norm: 1, 2 or inf.
        effort: of the search, 1, 2 or 3.
        seed: of its starts.
        memory: bytes for the networks that are searched at a time.
        progress: see `shown_progress`.
        points: (networks, D...), inputs whose slopes are starts.
    """
    found: list[Floor] = []
    block = networks_at_once(plan, effort, memory)
    with shown_progress("slope patterns", None, progress) as advance:
        for start in range(0, len(networks), block):
            own = networks[start : start + block]
            near = None if points is None else points[start : start + block]
            search = pattern_search(
                plan,
                own,
                norm=norm,
                effort=effort,
                seed=seed,
                memory=memory,
                advance=advance,
            )
            if isinstance(search, str):
                found += [no_floor(norm, f"no floor: {search}")] * len(own)
                continue
            found += _certified_floors(search, own, search.run(len(own), near), plan.rules_given)
    return found


@plain_arithmetic()
def _certified_floors(
    search: PatternSearch,
    networks: Sequence[Mapping[str, Tensor]],
    patterns: BestPatterns,
    given: tuple[str, ...],
) -> list[Floor]:
    linear, norm, v = search.linear, search.norm, patterns.directions
    slopes = {unit.slopes: own for unit, own in zip(linear.units, patterns.slopes, strict=True)}
    parameters = {**search.parameters, **slopes}
    points = torch.stack([torch.zeros_like(v), v], 1)
    first = torch.zeros(1, dtype=torch.int64, device=v.device)
    pairs = first, first + 1
    shapes = [(2, *shape) for shape in linear.plan.input_shapes]
    sizes = [math.prod(shape) for shape in linear.plan.input_shapes]
    parts = [
        part.reshape(len(v), *shape)
        for part, shape in zip(torch.split(points, sizes, 2), shapes, strict=True)
    ]
    values, errors = enclose_nodes(linear.plan, parameters, parts, keep=False)
    outputs, spread = (joined_outputs(linear.plan.graph, own) for own in (values, errors))
    moved = differences(points, outputs, pairs, norm)
    proved = quotients(*moved, spread, pairs, norm)[:, 0]
    promised = quotients(*moved, torch.zeros_like(spread), pairs, norm)[:, 0]
    found = []
    flushed = denormals_flushed()
    for network in range(len(v)):
        value = float(proved[network])
        if value < _NEARLY_ALL * float(promised[network]) and len(shapes) == 1:
            own = {name: tensor[network] for name, tensor in parameters.items()}
            pair = points[network].reshape(shapes[0])
            value = max(value, certified_quotient(linear.plan, own, pair, norm=norm)[0])
        reason = FLUSHED if flushed else _NOTHING if not value > 0 else None
        found.append(
            Floor(
                value,
                log_down(value),
                norm,
                not flushed,
                reason,
                given=given,
                slopes={
                    unit.name: own[network].clone()
                    for unit, own in zip(linear.units, patterns.slopes, strict=True)
                },
                direction=v[network].clone(),
            )
        )
    return found
