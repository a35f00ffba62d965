"""Checks of values by annotated types: `Annotated[int, AtLeast(1)]` says what a value must be.

What `checked` understands: int, float and bool, text, `tuple[int, ...]` (in the file a list), a
`Literal`, and unions of these; all but bool, literals and unions with a limit.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin


class Limit(Protocol):
    """What holds of a value beside its type; its text are the words for it."""

    def holds(self, value: Any) -> bool:
        """Whether the value is inside."""


@dataclass(frozen=True)
class AtLeast:
    """Limit of numbers: `minimum <= value`."""

    minimum: float

    def holds(self, value: float) -> bool:
        """Whether the value is inside; NaN is not."""
        return self.minimum <= value

    def __str__(self) -> str:
        return f"at least {self.minimum:g}"


@dataclass(frozen=True)
class Above:
    """Limit of numbers: `minimum < value`."""

    minimum: float

    def holds(self, value: float) -> bool:
        """Whether the value is inside; NaN is not."""
        return self.minimum < value

    def __str__(self) -> str:
        return f"above {self.minimum:g}"


@dataclass(frozen=True)
class Between:
    """Limit of numbers: `minimum <= value <= maximum`."""

    minimum: float
    maximum: float

    def holds(self, value: float) -> bool:
        """Whether the value is inside; NaN is not."""
        return self.minimum <= value <= self.maximum

    def __str__(self) -> str:
        return f"at least {self.minimum:g} and at most {self.maximum:g}"


@dataclass(frozen=True)
class OneOf:
    """Limit of texts: one of the names that are registered when it is asked."""

    names: Collection[str]

    def holds(self, value: str) -> bool:
        """Whether the text is one of the names."""
        return value in self.names

    def __str__(self) -> str:
        names = ", ".join(f'"{name}"' for name in self.names)
        return f"one of {names}" if len(self.names) > 1 else names


class NotEmpty:
    """Limit of texts: any that is not empty."""

    def holds(self, value: str) -> bool:
        """Whether the text is not empty."""
        return bool(value)

    def __str__(self) -> str:
        return "a text that is not empty"


@dataclass(frozen=True)
class Described:
    """Words for what is expected, in place of those that the type gives."""

    words: str


def _integer(value: Any, limit: Limit) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not limit.holds(value):
        raise ValueError(f"an integer {limit}")
    return value


def _number(value: Any, limit: Limit) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"a number {limit}")
    if not (limit.holds(value) and value < math.inf):
        raise ValueError(f"a finite number {limit}")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any, limit: Limit) -> str:
    if not isinstance(value, str) or not limit.holds(value):
        raise ValueError(str(limit))
    return value


def _integers(value: Any, limit: Limit) -> tuple[int, ...]:
    expected = f"a list of distinct integers, {limit} each, not empty"
    if not isinstance(value, list) or not value:
        raise ValueError(expected)
    try:
        numbers = [_integer(entry, limit) for entry in value]
    except ValueError:
        raise ValueError(expected) from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(expected)
    return tuple(sorted(numbers))


def _one_of_kinds(kinds: tuple[Any, ...], value: object) -> Any:
    expected = []
    for kind in kinds:
        try:
            return checked(kind, value)
        except ValueError as error:  # noqa: PERF203 (two or three kinds)
            expected.append(str(error))
    raise ValueError(" or ".join(expected))


_WITH_LIMIT = {int: _integer, float: _number, str: _text, tuple[int, ...]: _integers}


def checked(kind: Any, value: object) -> Any:
    """Return a value of a TOML file as its annotated type has it: a list as a sorted tuple.

    Args:
        kind: the type, see the top of this file.
        value: from the file.

    Raises:
        ValueError: the value is none of the type, or outside its limit; the message says what is
            expected.
        TypeError: this kind of type cannot be checked.

    Example:
        >>> checked(Annotated[tuple[int, ...], AtLeast(0)], [3, 1])
        (1, 3)
        >>> checked(Literal["full"] | Annotated[int, AtLeast(1)], 0)
        Traceback (most recent call last):
        ValueError: "full" or an integer at least 1
    """
    if get_origin(kind) is Annotated:
        base, limit = get_args(kind)
        if not isinstance(limit, Described):
            return _WITH_LIMIT[base](value, limit)
        try:
            return checked(base, value)
        except ValueError:
            raise ValueError(limit.words) from None
    if kind is bool:
        return _boolean(value)
    if get_origin(kind) in {Union, types.UnionType}:
        return _one_of_kinds(get_args(kind), value)
    if get_origin(kind) is Literal:
        return _text(value, OneOf(get_args(kind)))
    raise TypeError(f"{kind}: no check for values of this type")
