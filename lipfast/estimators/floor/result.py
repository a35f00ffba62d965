"""What a floor is: a number below which no method that knows only slopes can prove anything."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from lipfast.estimators.estimate import format_value, norm_name
from lipfast.norms import Norm
from lipfast.text import given_rules

WHAT_IT_SAYS = "no bound that ignores reachability can be below"
_WHAT_IT_IS_NOT = "not a bound of the Lipschitz constant: perhaps no input has these slopes"


@dataclass(frozen=True, repr=False)
class Floor:
    r"""The largest Jacobian norm found over slopes that units may have, each at an end of its own.

    $\max_\sigma \|J(\sigma)\| \ge$ `value` over all slopes between the ends that the rules of the
    activations give. A method that knows of activations nothing but these slopes holds for all of
    them at once, and cannot prove less: the product of norms, the interval Jacobian, quadratic
    constraints. It says nothing of the Lipschitz constant itself, which may be smaller (no input
    has these slopes) or larger (a better pattern was not found); so it is no `Estimate`.

    Attributes:
        value: at most the norm of one pattern's Jacobian; 0 where nothing was found.
        log_value: its natural logarithm, rounded down.
        norm: 1, 2 or inf.
        certified: whether rounding is accounted for in it.
        reason: why it is 0 or not certified.
        given: ops whose slopes a user wrote (`lipfast.rule`).
        slopes: name of an activation's node -> the slopes of its units, in the shape of a sample.
        direction: the input direction (D,) that the pattern's Jacobian stretches so much.

    Examples:
        >>> floor = Floor(2.5, 0.916, 2, True)
        >>> floor
        Floor(2.5, l2, certified: no bound that ignores reachability can be below)
        >>> floor.side
        'floor'
    """

    side: ClassVar[Literal["floor"]] = "floor"

    value: float
    log_value: float
    norm: Norm
    certified: bool
    reason: str | None = None
    given: tuple[str, ...] = field(default=(), kw_only=True)
    slopes: Mapping[str, Tensor] = field(default_factory=dict, compare=False, kw_only=True)
    direction: Tensor | None = field(default=None, compare=False, kw_only=True)

    @property
    def trust(self) -> str:
        """Whether it is certified, and given which rules, in words."""
        trust = "certified" if self.certified else "not certified"
        return f"{trust} {given_rules(self.given)}" if self.given else trust

    def __repr__(self) -> str:
        if self._says_nothing:
            return f"Floor(0, {norm_name(self.norm)}; {self.reason})"
        value = format_value(self.value, self.log_value)
        text = f"{value}, {norm_name(self.norm)}, {self.trust}: {WHAT_IT_SAYS}"
        return f"Floor({text}; {self.reason})" if self.reason else f"Floor({text})"

    @property
    def _says_nothing(self) -> bool:
        """Whether it is 0, which no norm is below, and there is a reason to give instead."""
        return self.value == 0 and self.reason is not None

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, width: int = 96) -> list[str]:
        """Lines of a table of bounds."""
        if self._says_nothing:
            text = f"{'floor':<9}{'0':<14}{self.reason}"
            return textwrap.wrap(text, width, subsequent_indent=" " * 9)
        indent = " " * 9
        value = format_value(self.value, self.log_value)
        head = f"{'floor':<9}{value:<14}{norm_name(self.norm)}, {self.trust}: {WHAT_IT_SAYS}"
        notes = [f"({_WHAT_IT_IS_NOT})", *([self.reason] if self.reason else [])]
        wrapped = (
            textwrap.wrap(note, width, initial_indent=indent, subsequent_indent=indent)
            for note in notes
        )
        return [head, *(line for lines in wrapped for line in lines)]


def no_floor(norm: Norm, reason: str) -> Floor:
    """The floor of networks of which nothing is known: a norm is not negative."""
    return Floor(0.0, -math.inf, norm, True, reason)
