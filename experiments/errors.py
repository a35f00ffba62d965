"""The error of a configuration, and its words for a name that is unknown."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lipfast.errors import ArgumentError


class ConfigError(ArgumentError):
    """A sweep's TOML file, or a scale of it, cannot be used; the message names file and key."""


def unknown(kind: str, name: str, allowed: Iterable[str]) -> str:
    """Say that a name is unknown, which one is close to it, and what is allowed."""
    names = list(allowed)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"unknown {kind} '{name}'; {hint}allowed: {', '.join(names)}"
