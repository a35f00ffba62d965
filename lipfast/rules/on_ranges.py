"""Pointwise functions on ranges of their operand: slopes, values, and lines above and below them.

Part of the proof of upper bounds on a domain. A range is cut into cells, at the kinks of the
function and between them; slopes are enclosed cell by cell, rounded outwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from lipfast.graph.nodes import Node, Reference
from lipfast.rounding import UNIT_ROUNDOFF
from lipfast.rules.compositions import Program, tensors_of
from lipfast.rules.formulas import Formula, lowered, result
from lipfast.rules.intervals import Array, Interval, down, up
from lipfast.rules.registry import RULES, Call, written_here
from lipfast.rules.scalar_functions import ONE, Jet, about
from lipfast.rules.slopes import hull, left_of_prelu

_CELLS = 16  # of a smooth function


class Line(NamedTuple):
    """``slope * (v - c) + offset`` on one side of ``f(v) - f(c)``."""

    slope: Array
    offset: Array


@dataclass(frozen=True, eq=False)
class OnRanges:
    """What is known of a function between two points, for every unit.

    Attributes:
        lower: at most every difference quotient of two points of the range.
        upper: at least every one.
        above: a line above ``f(v) - f(c)``, for v in the range.
        below: a line below.
        least: at most ``f(v) - f(c)``.
        most: at least that.
    """

    lower: Array
    upper: Array
    above: Line
    below: Line
    least: Array
    most: Array

    def within(self, other: OnRanges, low: Array, high: Array) -> OnRanges:
        """What holds besides what is known of the same units, for v - c between two numbers.

        Slopes alone say more where values are much larger than their differences.
        """
        lower, upper = np.maximum(self.lower, other.lower), np.minimum(self.upper, other.upper)
        known = lower <= upper  # NaN is not
        lower, upper = np.where(known, lower, other.lower), np.where(known, upper, other.upper)
        alone = of_slopes_alone(lower, upper, low, high)
        middle = low / 2 + high / 2
        return OnRanges(
            lower,
            upper,
            _nearer(self.above, alone.above, middle, 1.0),
            _nearer(self.below, alone.below, middle, -1.0),
            np.fmax(self.least, alone.least),
            np.fmin(self.most, alone.most),
        )


def _nearer(first: Line, second: Line, middle: Array, sign: float) -> Line:
    """For each unit the line that is lower (sign 1) or higher in the middle."""
    with np.errstate(all="ignore"):
        values = [sign * (line.slope * middle + line.offset) for line in (first, second)]
    better = values[0] < values[1]  # NaN is not
    return Line(*(np.where(better, one, two) for one, two in zip(first, second, strict=True)))


@dataclass(frozen=True, eq=False)
class UnitFunctions:
    """A function of one variable for every unit, all alike but for numbers.

    Attributes:
        values: on intervals, (units, points).
        slopes: all difference quotients in each of some cells that have no kink inside.
        kinks: where cells are to be cut.
        cells: into how many a range is cut besides.
    """

    values: Callable[[Interval], Interval]
    slopes: Callable[[Interval], Interval]
    kinks: tuple[float, ...]
    cells: int

    def on(self, low: Array, high: Array, centre: Interval) -> OnRanges:
        """Between two ends (units,), for points c that lie in the range.

        Whatever is not finite says nothing: NaN or infinite.
        """
        with np.errstate(all="ignore"):
            points = self._points(low, high)
            cells = Interval(points[:, :-1], points[:, 1:])
            slopes = self.slopes(cells)
            width = np.maximum(up(cells.high - cells.low), 0.0)
            empty = cells.high <= cells.low
            # The hull of all where the range is one point.
            empty &= ~empty.all(1, keepdims=True)
            lower = np.where(empty, np.inf, slopes.low).min(1)
            upper = np.where(empty, -np.inf, slopes.high).max(1)
            values = self.values(Interval.of(points))
            own = self.values(Interval(centre.low[:, None], centre.high[:, None]))
            cut = _Cut(points, values, slopes, np.where(empty, 0.0, width), own, centre)
            level = np.zeros_like(low)
            chord = (values.high[:, -1] - values.low[:, 0]) / (high - low)
            chord = np.where(np.isfinite(chord), np.clip(chord, lower, upper), lower)
            above, below = cut.lines((chord, lower, upper))
            most, least = cut.offset(level), -cut.offset(level, -1.0)
        return OnRanges(lower, upper, above, below, least, most)

    def _points(self, low: Array, high: Array) -> Array:
        """Ends of cells, ascending from the lower to the upper end; close together near 0."""
        first, last = low[:, None], high[:, None]
        share = np.linspace(0.0, 1.0, self.cells + 1)
        start, end = np.arcsinh(first), np.arcsinh(last)
        inner = np.sinh(start + (end - start) * share)[:, 1:-1]
        kinks = np.broadcast_to(np.array(self.kinks), (len(low), len(self.kinks)))
        inside = np.clip(np.concatenate([inner, kinks], 1), first, last)
        return np.concatenate([first, np.sort(inside, 1), last], 1)


class _Cut(NamedTuple):
    """A function on the cells of each unit's range."""

    points: Array
    values: Interval
    slopes: Interval
    width: Array
    own: Interval
    centre: Interval

    def offset(self, slope: Array, sign: float = 1.0) -> Array:
        r"""The least t found with ``sign (f(v) - f(c)) <= sign slope (v - c) + t`` on the range.

        In a cell of width w with slopes from a to b, $g = f - s x$ exceeds its larger value at the
        ends by at most $w (b - s)(s - a) / (b - a)$, and not at all where s is not between.
        """
        s = slope[:, None]
        tilted = self.values - Interval.of(s) * Interval.of(self.points)
        ends = tilted.high if sign > 0 else -tilted.low
        most = np.maximum(ends[:, :-1], ends[:, 1:])
        above = np.maximum(up(self.slopes.high - s), 0.0)
        below = np.maximum(up(s - self.slopes.low), 0.0)
        smaller, larger = np.minimum(above, below), np.maximum(above, below)
        # a b / (a + b): the smaller one times a share from 1/2 to 1, which is 1 beside infinity.
        both = above + below
        divides = np.isfinite(both) & (both > 0.0)
        share = np.where(divides, larger / np.where(divides, both, 1.0), 1.0)
        extra = up(self.width * up(smaller * share * (1.0 + 16 * UNIT_ROUNDOFF)))
        # NaN stays, and says nothing.
        extra = np.where((smaller <= 0.0) | (self.width <= 0.0), 0.0, extra)
        top = up(most + extra).max(1)
        moved = Interval.of(s) * Interval(self.centre.low[:, None], self.centre.high[:, None])
        moved = moved - self.own
        found: Array = up(top + (moved.high if sign > 0 else -moved.low)[:, 0])
        return found

    def lines(self, slopes: Sequence[Array]) -> tuple[Line, Line]:
        """One line above and one below, of some slopes: those that are nearest in the middle."""
        centre = self.centre.low
        middle = self.points[:, 0] / 2 + self.points[:, -1] / 2 - centre
        found = []
        for sign in (1.0, -1.0):
            offsets = np.stack([self.offset(slope, sign) for slope in slopes])
            chosen = np.argmin(sign * np.stack(slopes) * middle + offsets, 0)[None]
            slope = np.take_along_axis(np.stack(slopes), chosen, 0)[0]
            offset = sign * np.take_along_axis(offsets, chosen, 0)[0]
            found.append(Line(slope, offset))
        return found[0], found[1]


def of_slopes_alone(lower: Array, upper: Array, low: Array, high: Array) -> OnRanges:
    """What slopes between two numbers say for v - c between two others, which hold 0."""
    with np.errstate(all="ignore"):
        width = high - low
        steep = (upper * high - lower * low) / width
        flat = (lower * high - upper * low) / width
        steep, flat = (np.where(np.isfinite(s), s, upper) for s in (steep, flat))
        least, most = np.minimum(lower * high, upper * low), np.maximum(upper * high, lower * low)
        above = np.maximum(up(low * down(lower - steep)), up(high * up(upper - steep)))
        below = np.maximum(up(low * down(flat - upper)), up(high * up(flat - lower)))
    linear = lower == upper
    above, below = (np.where(linear, 0.0, np.maximum(own, 0.0)) for own in (above, below))
    return OnRanges(
        lower,
        upper,
        Line(np.where(linear, lower, steep), above),
        Line(np.where(linear, lower, flat), -below),
        np.minimum(down(least), 0.0),
        np.maximum(up(most), 0.0),
    )


def unit_functions(call: Call, places: Tensor | None) -> UnitFunctions | None:
    """The function that a node is, entry by entry; None where nothing but its slopes is known.

    Args:
        call: of a node with one operand that varies.
        places: of the units among the entries of the node; None for all.
    """
    node = call.node
    if node.op not in RULES or not written_here(RULES[node.op]):
        return None
    if node.op in _KINKED:
        kinked = _KINKED[node.op](call)
        return None if kinked is None else _of_pieces(*kinked, places)
    program = _program_of(node)
    if program is None:
        return None
    numbers = {
        reference: _numbers_of_units(call, reference, places) for reference in tensors_of(program)
    }
    if any(own is None for own in numbers.values()):
        return None
    known = cast(Mapping[Reference, Interval], numbers)
    breakpoints = RULES[node.op].breakpoints
    kinks = breakpoints(node) if breakpoints is not None else (0.0,)

    def jet(x: Interval) -> Jet:
        return result(program, Jet(x, ONE, Interval.of(0.0)), Jet.constant, known)

    def slopes(x: Interval) -> Interval:
        middle = x.low / 2 + x.high / 2
        radius = up(np.maximum(x.high - middle, middle - x.low))
        inside = (x.low < middle) & (middle < x.high)
        return about(jet(Interval.of(middle)), jet(x), radius, inside)

    return UnitFunctions(lambda x: jet(x).value, slopes, kinks, _CELLS)


def _numbers_of_units(call: Call, reference: Reference, places: Tensor | None) -> Interval | None:
    """Entries of a parameter for every unit, (units, 1)."""
    value, rounding = call.tensor(reference).detach().double().cpu(), call.rounding(reference)
    error = torch.zeros_like(value) if rounding is None else rounding.detach().double().cpu()
    ends = []
    for end in (value - error, value + error):
        extra = max(0, end.dim() - len(call.node.shape))
        if any(size != 1 for size in end.shape[:extra]):
            return None
        own = end.reshape(end.shape[extra:]).expand(call.node.shape).reshape(-1, 1)
        ends.append((own if places is None else own[places.cpu()]).numpy())
    return Interval.of(*ends) if rounding is None else Interval.of(down(ends[0]), up(ends[1]))


# Piecewise linear functions

End: TypeAlias = "float | Array"
Pieces: TypeAlias = "tuple[tuple[float, ...], list[tuple[End, End]]]"


def _of_pieces(
    kinks: Sequence[float], slopes: Sequence[tuple[End, End]], places: Tensor | None
) -> UnitFunctions:
    """Slopes between kinks, one more than those: numbers, or one for each entry of the node."""

    def of_units(end: End) -> Array:
        if isinstance(end, float):
            return np.float64(end).reshape(1, 1)
        return (end if places is None else end[places.cpu().numpy()])[:, None]

    pieces = [Interval(of_units(low), of_units(high)) for low, high in slopes]
    ends = [-np.inf, *kinks, np.inf]

    def values(x: Interval) -> Interval:
        """With 0 at the first kink."""
        total = pieces[0] * (x.within(-np.inf, kinks[0]) - Interval.of(kinks[0]))
        for piece, begin, end in zip(pieces[1:], kinks, ends[2:], strict=True):
            total = total + piece * (x.within(begin, end) - Interval.of(begin))
        return total

    def slopes_in(x: Interval) -> Interval:
        low, high = np.full_like(x.low, np.inf), np.full_like(x.low, -np.inf)
        for piece, begin, end in zip(pieces, ends[:-1], ends[1:], strict=True):
            touched = (x.low < end) & (x.high > begin)
            touched |= (x.low == x.high) & (x.low >= begin) & (x.low <= end)
            low = np.where(touched, np.minimum(low, piece.low), low)
            high = np.where(touched, np.maximum(high, piece.high), high)
        return Interval(low, high)

    return UnitFunctions(values, slopes_in, tuple(kinks), 1)


def _between(*limits: object) -> Pieces | None:
    """Slope 1 between two limits, of which some may be none."""
    numbers = [float(x) for x in limits if isinstance(x, (bool, int, float))]
    if len(numbers) != sum(x is not None for x in limits) or sorted(numbers) != numbers:
        return None  # a tensor, or the limits cross
    kinks = tuple(x for x in numbers if math.isfinite(x))
    if len(kinks) != len(numbers) or not kinks:
        return None
    outside, inside = (0.0, 0.0), (1.0, 1.0)
    first = [outside] if limits[0] is not None else []
    last = [outside] if limits[1] is not None else []
    return kinks, [*first, inside, *last]


def _leaky(*slope: float) -> Pieces | None:
    found = hull(*slope)
    return None if found is None else ((0.0,), [found, (1.0, 1.0)])


def _prelu(call: Call) -> Pieces | None:
    ends = left_of_prelu(call)
    if ends is None:
        return None
    low, high = (end.cpu().expand(call.node.shape).reshape(-1).numpy() for end in ends)
    return (0.0,), [(low, high), (1.0, 1.0)]


def _threshold(call: Call) -> Pieces | None:
    level, value = call.node.number(1, "threshold", 0.0), call.node.number(2, "value", 0.0)
    return ((level,), [(0.0, 0.0), (1.0, 1.0)]) if level == value else None


def _softshrink(call: Call) -> Pieces | None:
    level = call.node.number(1, "lambd", 0.5)
    one = (1.0, 1.0)
    return ((-level, level), [one, (0.0, 0.0), one]) if 0.0 <= level < math.inf else None


def _rrelu(call: Call) -> Pieces | None:
    ends = call.node.number(1, "lower", 0.125), call.node.number(2, "upper", 1.0 / 3.0)
    middle = (ends[0] + ends[1]) / 2
    return _leaky(math.nextafter(middle, -math.inf), math.nextafter(middle, math.inf))


_SIXTH = (math.nextafter(1.0 / 6.0, 0.0), math.nextafter(1.0 / 6.0, 1.0))
_KINKED: Mapping[str, Callable[[Call], Pieces | None]] = {
    "aten.relu": lambda call: _between(0.0, None),
    "aten.relu6": lambda call: _between(0.0, 6.0),
    "aten.hardtanh": lambda call: _between(
        call.node.number(1, "min_val", -1.0), call.node.number(2, "max_val", 1.0)
    ),
    "aten.clamp": lambda call: _between(call.node.argument(1, "min"), call.node.argument(2, "max")),
    "aten.clamp_min": lambda call: _between(call.node.argument(1, "min"), None),
    "aten.clamp_max": lambda call: _between(None, call.node.argument(1, "max")),
    "aten.abs": lambda call: ((0.0,), [(-1.0, -1.0), (1.0, 1.0)]),
    "aten.leaky_relu": lambda call: _leaky(call.node.number(1, "negative_slope", 0.01)),
    "aten.prelu": _prelu,
    "aten.rrelu": _rrelu,
    "aten.hardsigmoid": lambda call: ((-3.0, 3.0), [(0.0, 0.0), _SIXTH, (0.0, 0.0)]),
    "aten.softshrink": _softshrink,
    "aten.threshold": _threshold,
}


# Smooth functions


def _program_of(node: Node) -> Program | None:
    """The formula of a node in its operand; None where it has none."""
    if node.op == "lipfast.composition":
        return cast(Program, node.args[2])
    formula, lowering = Formula(), _PROGRAMS.get(node.op)
    found = None if lowering is None else lowering(formula, node)
    if found is None:
        found = lowered(formula, node, lambda reference: 0)
    return formula.finished(found) if found else None


def _around(f: Formula, value: float) -> int:
    """A number that is not a float64."""
    return f.between(math.nextafter(value, -math.inf), math.nextafter(value, math.inf))


def _exponential_left(f: Formula, alpha: int, inner: int) -> int:
    """``max(x, 0) + alpha (exp(inner min(x, 0)) - 1)``."""
    zero = f.number(0.0)
    left = f.then("exp", f.mul(inner, f.smaller(0, zero)))
    return f.add(f.larger(0, zero), f.mul(alpha, f.add(left, f.number(-1.0))))


def _put_elu(f: Formula, node: Node) -> int | None:
    alpha, scale, inner = (
        node.number(*place)
        for place in ((1, "alpha", 1.0), (2, "scale", 1.0), (3, "input_scale", 1.0))
    )
    found = _exponential_left(f, f.number(alpha), f.number(inner))
    return f.mul(f.number(scale), found) if inner >= 0.0 else None


def _put_selu(f: Formula, node: Node) -> int:
    found = _exponential_left(f, _around(f, 1.6732632423543772), f.number(1.0))
    return f.mul(_around(f, 1.0507009873554805), found)


def _put_celu(f: Formula, node: Node) -> int | None:
    alpha = node.number(1, "alpha", 1.0)
    if not 0.0 < alpha < math.inf:
        return None
    return _exponential_left(f, f.number(alpha), f.quotient_of_numbers(1.0, alpha))


def _put_gelu_tanh(f: Formula, node: Node) -> int | None:
    if node.argument(1, "approximate", "none") != "tanh":
        return None
    cube = f.mul(f.mul(0, 0), 0)
    moved = f.add(0, f.mul(_around(f, 0.044715), cube))
    gate = f.then("tanh", f.mul(_around(f, math.sqrt(2.0 / math.pi)), moved))
    return f.mul(f.mul(0, f.number(0.5)), f.add(f.number(1.0), gate))


_PROGRAMS: Mapping[str, Callable[[Formula, Node], int | None]] = {
    "aten.elu": _put_elu,
    "aten.selu": _put_selu,
    "aten.celu": _put_celu,
    "aten.gelu": _put_gelu_tanh,
}
