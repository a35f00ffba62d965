"""Text from untrusted files, made fit for Parquet and for a terminal."""

from __future__ import annotations

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
