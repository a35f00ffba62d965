"""The commands `lipfast store ...`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from lipfast.cli.options import JsonOption
from lipfast.cli.terminal import EXIT_FAILED, clean, handle_errors, print_json
from lipfast.text import counted

Store = Annotated[str, typer.Argument(help="Folder of the store.", metavar="PATH")]

store_app = typer.Typer(
    help="Look at a store of scores, check it, merge its parts, export it.",
    epilog="""\b
Examples:
  lipfast store show scores/
  lipfast store verify scores/
  lipfast store compact scores/
  lipfast store export scores/ scores.csv""",
    no_args_is_help=True,
)

_SHOW_HELP = """Print counts, failures and the newest checkpoint per run.

\b
Examples:
  lipfast store show scores/
  lipfast store show scores/ --json
  lipfast store show scores/ --failed
"""


@store_app.command("show", help=_SHOW_HELP)
@handle_errors
def store_show(
    path: Store,
    failed: Annotated[
        bool, typer.Option("--failed", help="List every failed checkpoint and its reason instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a short summary of a store, or what failed."""
    from lipfast.scoring import show  # noqa: PLC0415 (start-up time: torch)

    if failed:
        failures = show.store_failures(path)
        if as_json:
            print_json(failures)
        else:
            typer.echo(clean(show.failures_text(failures)))
        return
    overview = show.store_overview(path)
    if as_json:
        print_json(overview)
    else:
        typer.echo(clean(show.overview_text(overview)))


_VERIFY_HELP = """Read every part of a store completely and check it.

\b
Example:
  lipfast store verify scores/

\b
Exit codes:
  0    the store is sound
  1    there are problems: each is printed
  2    there is no store of a known version
"""


@store_app.command("verify", help=_VERIFY_HELP)
@handle_errors
def store_verify(
    path: Store,
    as_json: JsonOption = False,
) -> None:
    """Read every part of a store and check it."""
    from lipfast.scoring import verify_store  # noqa: PLC0415 (start-up time: torch)

    found = verify_store(path)
    if as_json:
        print_json({"parts": found.parts, "rows": found.rows, "problems": list(found.problems)})
    else:
        verdict = counted(len(found.problems), "problem") if found.problems else "sound"
        typer.echo(f"{counted(found.parts, 'part')}, {counted(found.rows, 'row')}: {verdict}")
        for problem in found.problems:
            typer.echo(clean(f"  {problem}"))
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


_COMPACT_HELP = """Merge the parts of a store into few and drop rows that newer ones replace.

Readers see the same before and after. Scorers may go on writing meanwhile.

\b
Example:
  lipfast store compact scores/
"""


@store_app.command("compact", help=_COMPACT_HELP)
@handle_errors
def store_compact(path: Store, as_json: JsonOption = False) -> None:
    """Merge the parts of a store."""
    from lipfast.scoring import compact_store  # noqa: PLC0415 (start-up time: torch)

    done = compact_store(path)
    if as_json:
        print_json(asdict(done))
    else:
        typer.echo(
            f"{counted(done.parts_before, 'part')} with {counted(done.rows_before, 'row')} became "
            f"{counted(done.parts_after, 'part')} with {counted(done.rows_after, 'row')}"
        )


_EXPORT_HELP = """Write the scores into one .csv, .jsonl or .parquet file.

One row per checkpoint, its metadata as columns; with --table layers one row per layer.

\b
Examples:
  lipfast store export scores/ scores.csv
  lipfast store export scores/ layers.parquet --table layers
"""


@store_app.command("export", help=_EXPORT_HELP)
@handle_errors
def store_export(
    path: Store,
    to: Annotated[str, typer.Argument(help="File to write.", metavar="FILE")],
    *,
    table: Annotated[
        str, typer.Option(help="checkpoints or layers.", metavar="TABLE")
    ] = "checkpoints",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the scores into one file."""
    from lipfast.scoring import export_scores  # noqa: PLC0415 (start-up time: torch)

    rows = export_scores(path, to, cast("Any", table), overwrite=overwrite)
    if as_json:
        print_json({"file": to, "table": table, "rows": rows})
    else:
        typer.echo(clean(f"{counted(rows, 'row')} written to {to}"))
