"""Text for people and files: from untrusted sources, of errors, as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_DIRECTIONAL = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_CONTROL = [*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029, *_DIRECTIONAL]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROL}
_ESCAPES_BUT_NEWLINE = {code: text for code, text in _ESCAPES.items() if code != 0x0A}


def to_utf8(text: str) -> str:
    r"""Replace what UTF-8, and so Parquet, cannot hold: lone surrogates.

    Example:
        >>> print(to_utf8("run-\ud800"))
        run-\ud800
    """
    if text.isascii():  # nearly all, many times a checkpoint
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str, *, newlines: bool = False) -> str:
    r"""Escape what could steer a terminal or reorder a line: control and direction characters.

    Args:
        text: any text.
        newlines: leave line breaks as they are.

    Example:
        >>> print(printable("step\x1b[2J.pt"))
        step\x1b[2J.pt
    """
    if text.isascii() and text.isprintable():  # nearly all names, several times faster
        return text
    return to_utf8(text).translate(_ESCAPES_BUT_NEWLINE if newlines else _ESCAPES)


def alternatives(words: Sequence[str]) -> str:
    """List words, the last one after an or.

    Example:
        >>> alternatives(["a", "b", "c"])
        'a, b or c'
    """
    return f"{', '.join(words[:-1])} or {words[-1]}"


def counted(number: int, noun: str) -> str:
    """Write a number and its noun.

    Example:
        >>> counted(1, "checkpoint"), counted(2, "checkpoint")
        ('1 checkpoint', '2 checkpoints')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def given_rules(ops: Sequence[str]) -> str:
    """Say that something is proved given rules that users wrote.

    Example:
        >>> given_rules(["aten.asinh"]), given_rules(["aten.asinh", "aten.erf"])
        ('given the rule of aten.asinh', 'given the rules of aten.asinh and aten.erf')
    """
    if len(ops) == 1:
        return f"given the rule of {ops[0]}"
    return f"given the rules of {', '.join(ops[:-1])} and {ops[-1]}"


def strict_json(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by their names."""
    if isinstance(value, dict):
        return {key: strict_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing.

    torch appends its C++ stack to some messages.

    Example:
        >>> first_line(ValueError("no such size")), first_line(ValueError())
        ('no such size', 'ValueError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def kind_and_first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of what it says.

    Example:
        >>> kind_and_first_line(ValueError("no such size")), kind_and_first_line(ValueError())
        ('ValueError: no such size', 'ValueError')
    """
    kind, line = type(error).__name__, first_line(error)
    return line if line == kind else f"{kind}: {line}"
