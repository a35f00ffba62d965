"""Brackets of many matrices or kernels, keyed like the input: what their results share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Values = TypeVar("Values")
"""A tensor or list with one entry per matrix, or a dictionary."""

# How the native ops prove an upper bound: the codes of `UpperMethod`.
UPPER_METHODS = ("none", "cholesky", "holder")
CHOLESKY = UPPER_METHODS.index("cholesky")
_SHOWN = 20


def entry_name(kind: str, key: object) -> str:
    """What error messages call an entry, such as "matrix 0" or "kernel 'conv1.weight'"."""
    return f"{kind} {key!r}" if isinstance(key, str) else f"{kind} {key}"


def keys_of(values: Any) -> list[Any]:
    """Keys of a field of a result."""
    return list(values) if isinstance(values, dict) else list(range(len(values)))


def keyed(values: Sequence[Any], keys: Sequence[Any]) -> dict[Any, Any]:
    """A field of a result as a dictionary."""
    return dict(zip(keys, values, strict=True))


def listing(title: str, keys: list[Any], line: Callable[[Any], str]) -> str:
    """A result in text: a title, and a line for each of the first keys."""
    shown = keys[:_SHOWN]
    width = max((len(str(key)) for key in shown), default=0)
    lines = [title, *(f"  {key!s:<{width}}  {line(key)}" for key in shown)]
    if len(keys) > len(shown):
        lines.append(f"  ... and {len(keys) - len(shown)} more")
    return "\n".join(lines)
