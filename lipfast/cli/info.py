"""The command `lipfast info`."""

from __future__ import annotations

import typer

from lipfast.cli.options import JsonOption
from lipfast.cli.terminal import clean, handle_errors, print_json

INFO_HELP = """Print versions, CPU capability, threads and what was built.

\b
Example:
  lipfast info --json
"""


@handle_errors
def info(as_json: JsonOption = False) -> None:
    """Print versions, capability, threads and what was built."""
    from lipfast import _info  # noqa: PLC0415 (start-up time: torch)

    found = _info.info()
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(clean(str(found)))
