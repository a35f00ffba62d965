"""An upper bound as an expression: products of factors, and where branches meet, sums of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lipfast.estimators.upper.composition import Composition, Part
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.table import shortened

_ROOT = ""
_WIDTH = 100


@dataclass(frozen=True)
class Factor:
    """One op on a path: ``L(node) = exp(log_factor) L(operand)``.

    Attributes:
        name: of the layer, or path of the module.
        kind: of the layer, or name of the op.
        log_factor: natural logarithm of what the bound is multiplied by.
        log_value: of the bound behind it, with respect to the model's inputs.
        layer: index of the layer, if it is one.
        given: whether the op's rule is a user's.
    """

    name: str
    kind: str
    log_factor: float
    log_value: float
    layer: int | None = None
    given: bool = False


@dataclass(frozen=True)
class Branch:
    """One way from where branches part to where they meet.

    Attributes:
        steps: empty for an identity.
        log_factor: of the branch alone; its coefficient where branches meet is in it.
        share: of the sum (of the sum of squares for a concatenation, ...): how much of a relative
            change of this branch reaches the result.
        dominates: whether it is the largest.
    """

    steps: tuple[Factor | Join, ...]
    log_factor: float
    share: float
    dominates: bool


@dataclass(frozen=True)
class Join:
    """Where branches meet: an addition, a concatenation, a product of activations.

    Attributes:
        name: path of the module.
        kind: name of the op.
        branches: in the order of the operands.
        log_factor: natural logarithm of what the bound is multiplied by since they parted.
        log_value: of the bound behind it, with respect to the model's inputs.
        given: whether the op's rule is a user's.
    """

    name: str
    kind: str
    branches: tuple[Branch, ...]
    log_factor: float
    log_value: float
    given: bool = False

    @property
    def dominant(self) -> Branch:
        """The largest branch."""
        return next(branch for branch in self.branches if branch.dominates)


@dataclass(frozen=True, repr=False)
class Explanation:
    """How a bound was composed: a product of steps; ``print`` shows it as a tree.

    In the tree, factors of one are left out, and a join that occurs again is named only.

    Attributes:
        steps: from the input to the output: `Factor` and `Join`.
        title: one line: the bound.
    """

    steps: tuple[Factor | Join, ...]
    title: str = field(default="")

    def walk(self) -> Iterator[Factor | Join]:
        """Every factor and join, each once, those inside branches before their join."""
        yield from _steps_of(self.steps, set())

    def __repr__(self) -> str:
        rows: list[tuple[str, str, str]] = []
        _add_rows(self.steps, "", rows, set())
        width = max((len(text) for text, _, _ in rows), default=0)
        table = [("", "factor", "L"), *rows] if rows else []
        lines = [f"{text:<{width}}  {factor:>10}  {value:>10}" for text, factor, value in table]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])


def explanation(
    composition: Composition, layers: Sequence[LayerBracket], title: str
) -> Explanation:
    """The expression of a bound.

    Args:
        composition: constants of all nodes.
        layers: their brackets.
        title: one line.
    """
    return Explanation(_Builder(composition, layers).steps(composition.result, _ROOT), title)


class _Builder:
    """Splits the graph at its dominators: branches that meet at a node part at its dominator."""

    def __init__(self, composition: Composition, layers: Sequence[LayerBracket]) -> None:
        self._parts, self._layers = composition.parts, layers
        self._several_inputs = sum(not part.operands for part in self._parts.values()) > 1
        self._dominators = _dominators(composition.parts.values())
        self._known: dict[tuple[str, str], tuple[Factor | Join, ...]] = {}
        self._joins: dict[str, Join] = {}

    def steps(self, last: str, start: str) -> tuple[Factor | Join, ...]:
        """What lies between `start`, a dominator, and `last`, which is included."""
        if (last, start) not in self._known:
            found: list[Factor | Join] = []
            at = last
            while at != start:
                part = self._parts[at]
                if part.operands or self._several_inputs:
                    found.append(self._join(part) if len(part.operands) > 1 else self._factor(part))
                at = self._dominators[at]
            self._known[last, start] = tuple(reversed(found))
        return self._known[last, start]

    def _log(self, name: str) -> float:
        return 0.0 if name == _ROOT else self._parts[name].value.log

    def _factor(self, part: Part) -> Factor:
        log = part.value.log
        name, kind = part.module or part.name, part.op.rpartition(".")[2]
        if part.layer is not None:
            name, kind = self._layers[part.layer].name, self._layers[part.layer].kind
        before = self._log(part.operands[0]) if part.operands else 0.0
        return Factor(name, kind, _difference(log, before), log, part.layer, part.given)

    def _join(self, part: Part) -> Join:
        if part.name in self._joins:
            return self._joins[part.name]
        start = self._dominators[part.name]
        before = self._log(start)
        logs = [value.log for value in part.contributions]
        largest = logs.index(max(logs))
        branches = tuple(
            Branch(self.steps(operand, start), _difference(log, before), share, i == largest)
            for i, (operand, log, share) in enumerate(
                zip(part.operands, logs, part.shares, strict=True)
            )
        )
        log = part.value.log
        name, kind = part.module or part.name, part.op.rpartition(".")[2]
        factor = _difference(log, before)
        self._joins[part.name] = Join(name, kind, branches, factor, log, part.given)
        return self._joins[part.name]


def _difference(log: float, before: float) -> float:
    return log - before if math.isfinite(before) else log


def _dominators(parts: Iterable[Part]) -> dict[str, str]:
    """Immediate dominators; a root stands before all inputs (Cooper, Harvey, Kennedy, 2001)."""
    dominators: dict[str, str] = {}
    depth = {_ROOT: 0}
    for part in parts:
        common = part.operands[0] if part.operands else _ROOT
        for operand in part.operands[1:]:
            other = operand
            while common != other:
                if depth[common] >= depth[other]:
                    common = dominators[common]
                else:
                    other = dominators[other]
        dominators[part.name] = common
        depth[part.name] = depth[common] + 1
    return dominators


def _steps_of(steps: Sequence[Factor | Join], seen: set[int]) -> Iterator[Factor | Join]:
    for step in steps:
        if id(step) in seen:
            continue
        seen.add(id(step))
        if isinstance(step, Join):
            for branch in step.branches:
                yield from _steps_of(branch.steps, seen)
        yield step


def _four_digits(log: float) -> str:
    """Four digits of the number with this logarithm, of any size."""
    if abs(log) < 700 or math.isinf(log):
        return f"{math.exp(log):.4g}"
    decimal = log / math.log(10)
    return f"{10 ** (decimal % 1):.3f}e{math.floor(decimal):+d}"


def _add_rows(
    steps: Sequence[Factor | Join],
    indent: str,
    rows: list[tuple[str, str, str]],
    seen: set[int],
) -> None:
    """One row per factor other than one, join and branch."""
    shown = [
        step
        for step in steps
        if isinstance(step, Join) or step.layer is not None or step.log_factor or step.given
    ]
    for position, step in enumerate(shown):
        last = position == len(shown) - 1
        guide, inner = ("└─ ", "   ") if last else ("├─ ", "│  ")
        again = id(step) in seen
        notes = ", a user's rule" * step.given + ", as above" * again
        label = f"{step.name} ({step.kind}{notes})"
        room = max(20, _WIDTH - 24 - len(indent) - len(guide))
        rows.append(
            (
                indent + guide + shortened(label, room),
                _four_digits(step.log_factor),
                _four_digits(step.log_value),
            )
        )
        if isinstance(step, Join) and not again:
            seen.add(id(step))
            for number, branch in enumerate(step.branches):
                _add_branch(branch, indent + inner, number == len(step.branches) - 1, rows, seen)


def _add_branch(
    branch: Branch, indent: str, last: bool, rows: list[tuple[str, str, str]], seen: set[int]
) -> None:
    guide, inner = ("└─ ", "   ") if last else ("├─ ", "│  ")
    what = "branch" if branch.steps else "identity"
    mark = ", dominates" if branch.dominates else ""
    label = f"{branch.share:.0%} {what}{mark}"
    rows.append((indent + guide + label, _four_digits(branch.log_factor), ""))
    _add_rows(branch.steps, indent + inner, rows, seen)
