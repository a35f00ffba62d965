"""Estimates: numbers that say which side they bound, how they were got, and if that is proved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from lipfast.norms import Norm
from lipfast.text import given_rules

Side = Literal["lower", "upper"]


@dataclass(frozen=True)
class Estimate:
    """A number that bounds a Lipschitz constant or a norm from one side.

    Attributes:
        value: the bound; inf if it is unbounded or too large for float64 (see `reason`).
        log_value: natural logarithm, finite where a product of many layers overflows `value`.
        side: ``lower`` or ``upper``.
        norm: 1, 2 or inf.
        method: how it was got.
        certified: true in real arithmetic, with every rounding accounted for.
        reason: why it is inf, or not certified.
        given: ops whose rules a user wrote (`lipfast.rule`): the proof takes what they say for
            granted. Empty where lipfast's own rules are all that it rests on.

    Examples:
        >>> estimate = Estimate(2.5, 0.9163, "upper", 2, "spectral product", True)
        >>> float(estimate)
        2.5
        >>> estimate
        Estimate(upper 2.5, l2, certified, spectral product)
    """

    value: float
    log_value: float
    side: Side
    norm: Norm
    method: str
    certified: bool
    reason: str | None = None
    given: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def trust(self) -> str:
        """Whether it is certified, and given which rules, in words."""
        trust = "certified" if self.certified else "not certified"
        return f"{trust} {given_rules(self.given)}" if self.given else trust

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _summary(self) -> str:
        value = format_value(self.value, self.log_value)
        parts = [f"{self.side} {value}", norm_name(self.norm), self.trust, self.method]
        return ", ".join(parts) + (f": {self.reason}" if self.reason else "")


def norm_name(norm: Norm) -> str:
    """``l1``, ``l2`` or ``linf``."""
    return "linf" if math.isinf(norm) else f"l{int(norm)}"


def eight_digits(value: float) -> str:
    """A number in tables and lines."""
    return f"{value:.8g}"


def format_value(value: float, log_value: float) -> str:
    """Eight digits; for a finite number beyond float64, its power of ten."""
    if math.isinf(value) and math.isfinite(log_value):
        decimal = log_value / math.log(10)
        return f"{10 ** (decimal % 1):.6f}e{math.floor(decimal):+d}"
    return eight_digits(value)


def log_down(value: float) -> float:
    """Natural logarithm, rounded down; -inf for 0."""
    if value <= 0.0:
        return -math.inf
    log = math.log(value)
    return math.nextafter(log - abs(log) * 2.0**-51, -math.inf) if math.isfinite(log) else log
