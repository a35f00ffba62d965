"""The rule of several pointwise ops that are together a function of one variable.

``x sigmoid(x)`` is a product of two activations, of which one has no bound; as a function of x its
slope is at most 1.0999. The supremum of the slope is found by branch and bound: the line is cut
into cells, on each of which the slope is enclosed in interval arithmetic, and two half-lines
(see `growth`). Cells that may hold more than the best slope that was found are halved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from lipfast.graph.nodes import Node, Reference
from lipfast.rules.formulas import Instruction, result
from lipfast.rules.growth import Growth, Tail
from lipfast.rules.intervals import Array, Interval, down, up
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.products import ADVICE
from lipfast.rules.registry import Call, rule
from lipfast.rules.scalar_functions import ONE, Jet, about
from lipfast.rules.upward import Upward

# Cells whose slope may exceed the best one by less than this are not halved.
RTOL = 1e-9
# As many, or more for many functions.
_MOST_CELLS = 1 << 15
_CELLS_OF_ONE = 128
_MOST_ROUNDS = 100
# Functions that differ in their parameters: of more, those are taken together whose numbers agree
# in signs and leading bits: in 19 of the 63 behind the sign at first, then in fewer.
_MOST_ROWS = 512
_LAST_BITS = range(44, 64)
# Half-lines begin at one of these.
_STARTS = tuple(4.0**power for power in range(1, 24))
_GRID = np.concatenate([-(2.0 ** np.arange(-8, 40, 0.5)), 2.0 ** np.arange(-8, 40, 0.5)])

Program: TypeAlias = tuple[Instruction, ...]
Indices: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True)
class Extent:
    """How steep and how large a function of one variable is: bounds of |g'| and |g|."""

    slope: float
    size: float


@dataclass(frozen=True)
class _End:
    """What is looked for in slopes: how steep they are, the largest, or the least.

    Attributes:
        sign: 0 for magnitudes, 1 for the largest slope, -1 for the least (negated, as all here).
        room: what cells may exceed what was found by, if it is not a share of that.
    """

    sign: int
    room: float = 0.0

    def most(self, slopes: Interval) -> Array:
        """Upper bounds of it in cells."""
        if self.sign:
            return slopes.high if self.sign > 0 else -slopes.low
        return slopes.size

    def reached(self, slopes: Interval) -> float:
        """What slopes of single points reach."""
        if self.sign:
            return float((slopes.low if self.sign > 0 else -slopes.high).max())
        return float(slopes.least.max())

    def enough(self, found: float) -> float:
        """What need not be looked at more closely, from what was found."""
        return found + self.room if self.sign else found * (1.0 + RTOL)


_STEEPNESS = _End(0)


@dataclass(frozen=True)
class _Functions:
    """One program with several rows of numbers in the place of its tensors."""

    program: Program
    low: Array
    high: Array

    @property
    def tensors(self) -> list[Reference]:
        return tensors_of(self.program)

    def rows(self, chosen: Array | slice) -> _Functions:
        return _Functions(self.program, self.low[chosen], self.high[chosen])

    def on(self, x: Interval, row: Indices) -> Jet:
        """The functions on cells, each with the row that belongs to it."""
        tensors = {
            reference: Interval(self.low[row, index], self.high[row, index])
            for index, reference in enumerate(self.tensors)
        }
        variable = Jet(x, ONE, Interval.of(0.0))
        return result(self.program, variable, Jet.constant, tensors)

    def beyond(self, start: float, sign: float) -> Tail:
        """All rows together, for ``x = sign y`` and y >= start."""
        tensors = {
            reference: Interval.of(self.low[:, index].min(), self.high[:, index].max())
            for index, reference in enumerate(self.tensors)
        }
        one = Growth(Interval.of(sign), 0.0, 0.0, start)
        zero = one.at(Interval.of(0.0))
        variable = Tail(one.at(Interval.of(sign), 1.0), one)
        return result(self.program, variable, lambda v: Tail(one.at(v), zero), tensors)

    def by_sign(self) -> list[_Functions]:
        """The rows apart by the signs of their numbers, which decide what they do far away."""
        if not self.tensors:
            return [self]
        own = _kinds(self.low, self.high, _LAST_BITS[-1])
        return [self.rows(own == kind) for kind in range(own.max() + 1)]


def _kinds(low: Array, high: Array, last_bits: int) -> Indices:
    """For every row its kind: rows of one agree in signs and in all but the last bits."""
    ends = np.concatenate([low, high], 1)
    leading = (np.abs(ends).view(np.int64) >> last_bits) + 1
    kinds: Indices = np.unique(np.sign(ends) * leading, axis=0, return_inverse=True)[1]
    return kinds.reshape(-1)


def _fewer(low: Array, high: Array) -> tuple[Array, Array]:
    """Rows that hold the given ones: not many, each of numbers of one sign where those are."""
    for last_bits in _LAST_BITS:
        if len(low) <= _MOST_ROWS:
            break
        own = _kinds(low, high, last_bits)
        order = np.argsort(own, kind="stable")
        starts = np.searchsorted(own[order], np.arange(own.max() + 1))
        low = np.minimum.reduceat(low[order], starts)
        high = np.maximum.reduceat(high[order], starts)
    return low, high


def tensors_of(program: Program) -> list[Reference]:
    """The parameters and constants in a program, in order."""
    return [cast(Reference, op[1]) for op in program if op[0] == "tensor"]


@lru_cache(maxsize=1024)
def _extent(program: Program, numbers: bytes, rows: int, reach: float) -> Extent:
    low, high = np.frombuffer(numbers).reshape(2, rows, -1)
    functions = _Functions(program, low, high)
    with np.errstate(all="ignore"):
        tail, start = Extent(0.0, 0.0), reach
        if math.isinf(reach):
            start, tail = _tails(functions, _STEEPNESS)
            if math.isinf(tail.slope):
                return tail
        inside = _inside(functions, start, _STEEPNESS)
    return Extent(max(inside.slope, tail.slope), max(inside.size, tail.size))


@lru_cache(maxsize=1024)
def _slopes(
    program: Program, numbers: bytes, rows: int, reach: float
) -> tuple[float, float] | None:
    """The least and the largest slope, each to `RTOL` of the steepest; None: there is no bound."""
    steepest = _extent(program, numbers, rows, reach).slope
    if math.isinf(steepest):
        return None
    low, high = np.frombuffer(numbers).reshape(2, rows, -1)
    functions = _Functions(program, low, high)
    ends = []
    with np.errstate(all="ignore"):
        for sign in (-1, 1):
            end, start, tail = _End(sign, RTOL * steepest), reach, -math.inf
            if math.isinf(reach):
                start, beyond = _tails(functions, end)
                tail = beyond.slope
            ends.append(min(max(_inside(functions, start, end).slope, tail), steepest))
    return -ends[0], ends[1]


def _tails(functions: _Functions, end: _End) -> tuple[float, Extent]:
    """A start of the half-lines, and bounds on them: as small as the slopes elsewhere, if any."""
    rows = np.repeat(np.arange(len(functions.low)), len(_GRID))
    grid = np.tile(_GRID, len(functions.low))
    reached = end.reached(functions.on(Interval.of(grid), rows).slope)
    groups = functions.by_sign()
    best = _STARTS[0], Extent(math.inf, math.inf)
    for start in _STARTS:
        right = [group.beyond(start, 1.0) for group in groups]
        left = [group.beyond(start, -1.0) for group in groups]
        slopes = [tail.slope.range for tail in right] + [-tail.slope.range for tail in left]
        slope = max(float(end.most(own)) for own in slopes)
        if slope < best[1].slope:
            sizes = [float(tail.value.range.size) for tail in (*right, *left)]
            best = start, Extent(slope, max(sizes))
        if slope <= end.enough(reached):
            break
    return best


def _inside(functions: _Functions, reach: float, end: _End) -> Extent:
    """Bounds between -reach and reach."""
    points = reach * 2.0 ** -np.arange(0.0, 6.0 + max(0.0, math.log2(max(reach, 1.0))))
    ends = np.concatenate([-points, [0.0], points[::-1]])
    count = len(functions.low)
    row = np.repeat(np.arange(count), len(ends) - 1)
    low, high = np.tile(ends[:-1], count), np.tile(ends[1:], count)
    size = 0.0
    bound, best = -math.inf, -math.inf
    if not end.sign:
        bound, best = 0.0, 2.0**-1000  # no slope below is worth a search
    for turn in range(_MOST_ROUNDS):
        middle = low + (high - low) / 2
        radius = up(np.maximum(high - middle, middle - low))
        narrow = (middle <= low) | (middle >= high)
        own = functions.on(Interval.of(middle), row)
        jet = functions.on(Interval(low, high), row)
        slopes = end.most(about(own, jet, radius, ~narrow))
        if turn == 0:
            size = float(jet.value.size.max())
        best = max(best, end.reached(own.slope))
        last = turn == _MOST_ROUNDS - 1 or len(low) > max(_MOST_CELLS, _CELLS_OF_ONE * count)
        open_ = (slopes > end.enough(best)) & ~narrow & (not last)
        bound = max(bound, float(slopes[~open_].max(initial=bound)))
        if not open_.any():
            break
        low, high, middle, row = (part[open_] for part in (low, high, middle, row))
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
        row = np.concatenate([row, row])
    return Extent(bound, size)


def _numbers(call: Call, program: Program) -> tuple[bytes, int]:
    """The numbers in a program's tensors: lower and upper ends, a row for each function."""
    references = tensors_of(program)
    if not references:
        return b"", 1
    ends = []
    for reference in references:
        value = call.tensor(reference).detach().double().cpu().numpy()
        room = call.rounding(reference)
        if room is None:
            ends += [value, value]
        else:
            radius = room.detach().double().cpu().numpy()
            ends += [down(value - radius), up(value + radius)]
    rows = np.stack([end.reshape(-1) for end in np.broadcast_arrays(*ends)], 1)
    rows = np.unique(rows, axis=0)
    low, high = _fewer(rows[:, 0::2], rows[:, 1::2])
    return np.stack([low, high]).astype(np.float64).tobytes(), len(low)


def _extent_of(call: Call) -> Extent:
    program = cast(Program, call.node.args[2])
    size = call.magnitudes[0].entry if call.magnitudes else Upward(math.inf)
    return _extent(program, *_numbers(call, program), size.value)


def _slopes_of(call: Call) -> tuple[float, float] | None:
    program = cast(Program, call.node.args[2])
    size = call.magnitudes[0].entry if call.magnitudes else Upward(math.inf)
    return _slopes(program, *_numbers(call, program), size.value)


def _magnitude_of_composition(call: Call) -> Magnitude:
    return Magnitude(entry=Upward.of(_extent_of(call).size))


def composition(source: Reference, node: Node, program: Program) -> Node:
    """A node that does what `node` does, as a function of one that comes before it."""
    args = (source, node.op, program)
    return Node(node.name, "lipfast.composition", args, (), node.shape, node.module)


@rule(
    "lipfast.composition",
    product=lambda node: True,
    magnitude=_magnitude_of_composition,
    parameter_errors="read",
    slopes=_slopes_of,
)
def function_of_one_variable(call: Call) -> Upward:
    """``sup |g'|`` for a composition g of pointwise ops: over all numbers, or those of the domain.

    Stands for a node in graphs that bounds are computed on; it is never evaluated.
    """
    slope = _extent_of(call).slope
    if math.isinf(slope):
        return call.unbounded(f"{call.node.args[1]}: {ADVICE}")
    return call.input * slope
