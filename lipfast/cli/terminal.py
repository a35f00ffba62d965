"""What the commands share: errors as one message and an exit code, text fit for a terminal."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import typer

from lipfast.errors import LipfastError
from lipfast.text import printable, strict_json

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

Command = TypeVar("Command", bound=Callable[..., None])


def handle_errors(command: Command) -> Command:
    """Turn errors that lipfast raises on purpose into one message and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # whoever read stdout has seen enough: typer ends quietly
        except (LipfastError, OSError) as error:
            say(f"lipfast: error: {error}")
            raise typer.Exit(EXIT_USAGE) from None
        except KeyboardInterrupt:
            say("lipfast: interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def clean(text: str) -> str:
    """Escape what could steer a terminal."""
    return printable(text, newlines=True)


def say(text: str) -> None:
    """Print a message to stderr."""
    typer.echo(clean(text), err=True)


def print_json(value: Any) -> None:
    """Print a value as JSON to stdout."""
    typer.echo(json.dumps(strict_json(value), indent=1, default=str))


def answer(as_json: bool, value: Any, text: str) -> None:
    """Print a value as JSON or as text to stdout."""
    if as_json:
        print_json(value)
    else:
        typer.echo(clean(text))
