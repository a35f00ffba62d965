"""The command line: arguments in, calls of the library, text or JSON out."""

from __future__ import annotations

from lipfast.cli.program import app, main

__all__ = ["app", "main"]
