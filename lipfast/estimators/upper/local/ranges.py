r"""Ranges of what activations read on a domain, and the slopes that they have there.

Part of the proof of upper bounds on a domain. All is said of differences from the centre of the
domain: with $\delta b$ what is alive before a step, $\delta v = C \delta b$ what its activation
reads and $\delta b' = A \delta b + B \delta a$ what is carried on. Between lines above and below
$\delta a$ as functions of $\delta v$ every row of C is followed back to the inputs (Zhang et al.,
2018, CROWN), where the domain bounds it. See docs/bounds.md, "Slopes on a domain".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import enclose_nodes, missing_error_rules
from lipfast.estimators.upper.local.around import AroundCentre, around_centre, lengths
from lipfast.estimators.upper.quadratic.graph_linear import Coefficients
from lipfast.estimators.upper.quadratic.graph_problem import (
    EntrySlopes,
    GraphStep,
    Problem,
    Units,
    entry_key,
    problem_of,
)
from lipfast.estimators.upper.quadratic.graph_room import QuadraticBoundError
from lipfast.estimators.upper.sweep import ITSELF
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.architecture import Architecture
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import stack
from lipfast.rounding import UNDERFLOW, gamma, widened
from lipfast.rules.intervals import Interval
from lipfast.rules.on_ranges import OnRanges, of_slopes_alone, unit_functions

# What is known of numbers beyond is not worth a proof.
_BEYOND = 2.0**300


@dataclass(frozen=True)
class Span:
    """Entries that lie between two numbers each, which hold 0."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitudes."""
        return torch.maximum(-self.low, self.high)

    def met(self, other: Span) -> Span:
        """What lies in both."""
        return Span(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))

    def fits(self) -> bool:
        """Whether all numbers are finite and not too large."""
        return bool(((-self.low <= _BEYOND) & (self.high <= _BEYOND)).all())


@dataclass(frozen=True)
class _Lines:
    """Lines above and below what the units of a step give, as functions of what they read."""

    steep_above: Tensor
    above: Tensor
    steep_below: Tensor
    below: Tensor


@dataclass(frozen=True)
class BoundedStep:
    """A step that has been bounded.

    Attributes:
        step: it.
        lines: of its units; None for whole vectors.
        longest: of whole vectors, how long what comes out can be.
        alive: what is alive before it.
        read: what it reads.
        out: what its activation gives.
        rooms: what rounding, and errors of C, A and B, add to products with a row of sizes: see
            `_room`.
        tiny: more than what underflows between a row of what is carried on and its like before.
    """

    step: GraphStep
    lines: _Lines | None
    longest: float
    alive: Span
    read: Span
    out: Span
    rooms: tuple[Tensor, Tensor, Tensor]
    tiny: float


def slopes_on_domain(
    plan: Architecture, parameters: Mapping[str, Tensor], domain: Domain, *, memory: int
) -> EntrySlopes:
    r"""Ranges of all difference quotients of activations between points of a domain.

    Args:
        plan: the architecture.
        parameters: of one network, resolved.
        domain: of the inputs.
        memory: bytes that one matrix, and what makes it, may take.

    Returns:
        By `entry_key` of a node, $\alpha$ and $\beta$ of all its entries. Nodes of which the domain
        says nothing, because an op has no rule for rounding errors, a matrix is too large or a
        number leaves float64, are not in it.
    """
    ranges = ranges_on_domain(plan, parameters, domain, memory=memory)
    return {} if ranges is None else ranges.slopes


@plain_arithmetic()
def ranges_on_domain(
    plan: Architecture, parameters: Mapping[str, Tensor], domain: Domain, *, memory: int
) -> Ranges | None:
    """Ranges of what activations read; None where nothing can be said. See `slopes_on_domain`."""
    if missing_error_rules(plan):
        return None
    try:
        problem = problem_of(plan, parameters, memory=memory)
    except QuadraticBoundError:
        return None
    around = around_centre(plan, domain)
    stacked = stack(ResolvedNetworks([dict(parameters)]), plan.used_parameters, torch.float64)
    points = [own[None, None].clone() for own in around.centre]
    values, errors = enclose_nodes(plan, stacked, points)
    centres = {
        name: (value[0, 0].reshape(-1), errors[name][0, 0].reshape(-1))
        for name, value in values.items()
    }
    return Ranges(plan, parameters, problem, around, centres)


class Ranges:
    """The steps of one network, one after the other.

    Attributes:
        passed: those that could be bounded.
        slopes: of their units, see `slopes_on_domain`.
    """

    def __init__(
        self,
        plan: Architecture,
        parameters: Mapping[str, Tensor],
        problem: Problem,
        around: AroundCentre,
        centres: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        self._plan, self._parameters, self._problem = plan, parameters, problem
        self._around, self._centres = around, centres
        self.passed: list[BoundedStep] = []
        widths = [sum(problem.inputs)]
        for step in problem.steps:
            widths += [sum(step.before), sum(step.behind)]
            widths += [step.constraint.inputs, step.constraint.outputs]
        # Of an entry of a product of matrices, and of what is added to it.
        self._rounding = gamma(max(widths) + 16)
        self._terms = 4 * max(widths) + 64
        self.slopes = self._found()

    def _found(self) -> EntrySlopes:
        """Slopes of the units of all steps."""
        slopes = {}
        alive = Span(-self._around.radii, self._around.radii)
        for step in self._problem.steps:
            read = self._range_of_rows(step, alive)
            if not (alive.fits() and read.fits()):
                break
            if step.units is None:
                length = float(lengths(read.size[None]))
                longest = length * float((-step.constraint.products).sqrt()) * (1.0 + 2.0**-40)
                longest += UNDERFLOW
                ends = read.low.new_full((step.constraint.outputs,), longest)
                lines, out = None, Span(-ends, ends)
            else:
                longest = 0.0
                local = self._on_ranges(step.units, read)
                slopes[entry_key(step.units.step.node)] = _slopes_of_entries(step.units, local)
                tensors = (*local.above, *local.below)
                lines = _Lines(*map(torch.from_numpy, tensors))
                out = Span(torch.from_numpy(local.least), torch.from_numpy(local.most))
                if not all(bool((t.abs() <= _BEYOND).all()) for t in vars(lines).values()):
                    break
            if not out.fits():
                break
            rooms = (
                self._room(step.read, alive.size),
                self._room(step.added, out.size),
                self._room(step.kept, alive.size),
            )
            tiny = UNDERFLOW * (1.0 + sum(float(own.size.sum()) for own in (alive, read, out)))
            passed = BoundedStep(step, lines, longest, alive, read, out, rooms, tiny)
            self.passed.append(passed)
            alive = self._carried(passed)
        return slopes

    def _on_ranges(self, units: Units, read: Span) -> OnRanges:
        """What the domain says of the units of a step."""
        low, high = (end.numpy() for end in (read.low, read.high))
        lower, upper = (end[units.places].numpy() for end in units.slopes)
        alone = of_slopes_alone(lower, upper, low, high)
        if units.operand not in self._centres:
            return alone
        value, error = (own[units.places] for own in self._centres[units.operand])
        step = units.step
        operands = [ITSELF] * len(step.names)
        call = step.call(operands, (), self._parameters, self._plan.constants, 2)
        functions = unit_functions(call, units.places)
        if functions is None:
            return alone
        infinity = torch.full_like(value, torch.inf)
        centre = [torch.nextafter(value + s * error, s * infinity) for s in (-1.0, 1.0)]
        first = torch.nextafter(centre[0] + read.low, -infinity)
        last = torch.nextafter(centre[1] + read.high, infinity)
        if not bool((first.isfinite() & last.isfinite()).all()):
            return alone
        middle = Interval(centre[0].numpy(), centre[1].numpy())
        return functions.on(first.numpy(), last.numpy(), middle).within(alone, low, high)

    # Rounding

    def _room(self, matrix: Coefficients | None, size: Tensor) -> Tensor:
        r"""``gamma |M| s + E s + tiny`` for entries of these sizes s.

        A row of $|\Lambda|$ times it is what $\Lambda M$ may be off by, times such entries.
        """
        rows = len(size) if matrix is None or matrix.value is None else len(matrix.value)
        tiny = UNDERFLOW * (1.0 + size.sum())
        if matrix is None:
            return tiny.expand(rows)
        found = size if matrix.value is None else matrix.value.abs() @ size
        found = found * self._rounding + tiny
        return found if matrix.error is None else found + matrix.error @ size

    def _carried(self, passed: BoundedStep) -> Span:
        """``A b + B a`` for all entries between their ends."""
        step = passed.step
        low, high = _product_of_span(step.added, passed.out)
        room = passed.rooms[1] * 2.0
        if step.kept is not None:
            least, most = _product_of_span(step.kept, passed.alive)
            low, high = low + least, high + most
            room = room + passed.rooms[2] * 2.0 + (high - low) * self._rounding
        room = widened(room, self._terms)
        return Span((low - room).clamp_max(0.0), (high + room).clamp_min(0.0))

    # From a step back to the inputs

    def _range_of_rows(self, step: GraphStep, alive: Span) -> Span:
        """What a step reads: entry by entry, and by lines through all steps before it."""
        room = self._room(step.read, alive.size)
        low, high = _product_of_span(step.read, alive)
        wide = widened(room * 2.0, self._terms)
        direct = Span((low - wide).clamp_max(0.0), (high + wide).clamp_min(0.0))
        rows = step.read.dense(sum(step.before), self._problem.like)
        most = self._most(torch.cat([rows, -rows]), torch.cat([room, room]))
        count = len(rows)
        return direct.met(Span(-most[count:].clamp_min(0.0), most[:count].clamp_min(0.0)))

    def _most(self, rows: Tensor, room: Tensor) -> Tensor:
        """Upper bounds of rows of what is alive now, over the domain.

        Args:
            rows: (K, alive).
            room: what they are off by, (K).
        """
        added = torch.zeros_like(room)
        for passed in reversed(self.passed):
            rows, added, room = self._behind(passed, rows, added, room)
        roundings = self._terms + 16 * len(self.passed)
        found = self._around.reach(rows) + added
        return found + widened(room + found.abs() * 2.0**-50, roundings)

    def _behind(
        self, passed: BoundedStep, rows: Tensor, added: Tensor, room: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of what is alive before a step in the place of those behind it."""
        step, size = passed.step, rows.abs()
        b, c = step.added.value, step.read.value
        own = rows if b is None else rows @ b
        room = room + size @ passed.rooms[1] + passed.tiny
        before = None
        if step.kept is not None:
            a = step.kept.value
            before = rows if a is None else rows @ a
            room = room + size @ passed.rooms[2]
        if passed.lines is None:
            room = room + lengths(own) * passed.longest
            if before is None:
                before = rows.new_zeros(len(rows), sum(step.before))
            return before, added, room
        lines = passed.lines
        above, below = own.clamp_min(0.0), own.clamp_max(0.0)
        turned = above * lines.steep_above + below * lines.steep_below
        added = added + (above @ lines.above + below @ lines.below)
        largest = torch.maximum(lines.above.abs(), lines.below.abs())
        room = room + self._rounding * (own.abs() @ largest + added.abs())
        room = room + self._rounding * (turned.abs() @ passed.read.size)
        room = room + turned.abs() @ passed.rooms[0]
        found = turned if c is None else turned @ c
        if before is not None:
            found = found + before
            room = room + self._rounding * (found.abs() @ passed.alive.size)
        return found, added, room


def _product_of_span(matrix: Coefficients, span: Span) -> tuple[Tensor, Tensor]:
    """About the ends of M x for entries x between their own."""
    if matrix.value is None:
        return span.low, span.high
    above, below = matrix.value.clamp_min(0.0), matrix.value.clamp_max(0.0)
    return above @ span.low + below @ span.high, above @ span.high + below @ span.low


def _slopes_of_entries(units: Units, local: OnRanges) -> tuple[Tensor, Tensor]:
    """Slopes of all entries of a node: of units those on their ranges."""
    lower, upper = (end.clone() for end in units.slopes)
    lower[units.places] = torch.from_numpy(local.lower)
    upper[units.places] = torch.from_numpy(local.upper)
    return lower, upper
