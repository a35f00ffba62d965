"""The command `lipfast info`."""

from __future__ import annotations

from lipfast.cli.options import JsonOption
from lipfast.cli.terminal import answer, handle_errors


@handle_errors
def info(as_json: JsonOption = False) -> None:
    """Print versions, CPU capability, threads and what was built.

    \b
    Example:
      lipfast info --json
    """  # noqa: D301 (\b is typer's mark)
    from lipfast import _info  # noqa: PLC0415 (start-up time: torch)

    found = _info.info()
    answer(as_json, found.to_dict(), str(found))
