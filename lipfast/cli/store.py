"""The commands `lipfast store ...`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from lipfast.cli.options import JsonOption
from lipfast.cli.terminal import EXIT_FAILED, answer, handle_errors
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


@store_app.command("show")
@handle_errors
def store_show(
    path: Store,
    failed: Annotated[
        bool, typer.Option("--failed", help="List every failed checkpoint and its reason instead.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print counts, failures and the newest checkpoint per run.

    \b
    Examples:
      lipfast store show scores/
      lipfast store show scores/ --json
      lipfast store show scores/ --failed
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import show  # noqa: PLC0415 (start-up time: torch)

    if failed:
        failures = show.store_failures(path)
        answer(as_json, failures, show.failures_text(failures))
    else:
        overview = show.store_overview(path)
        answer(as_json, overview, show.overview_text(overview))


@store_app.command("verify")
@handle_errors
def store_verify(
    path: Store,
    as_json: JsonOption = False,
) -> None:
    """Read every part of a store completely and check it.

    \b
    Example:
      lipfast store verify scores/

    \b
    Exit codes:
      0    the store is sound
      1    there are problems: each is printed
      2    there is no store of a known version
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import verify_store  # noqa: PLC0415 (start-up time: torch)

    found = verify_store(path)
    verdict = counted(len(found.problems), "problem") if found.problems else "sound"
    head = f"{counted(found.parts, 'part')}, {counted(found.rows, 'row')}: {verdict}"
    text = "\n".join([head, *(f"  {problem}" for problem in found.problems)])
    answer(as_json, asdict(found), text)
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


@store_app.command("compact")
@handle_errors
def store_compact(path: Store, as_json: JsonOption = False) -> None:
    """Merge the parts of a store into few and drop rows that newer ones replace.

    Readers see the same before and after. Scorers may go on writing meanwhile.

    \b
    Example:
      lipfast store compact scores/
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import compact_store  # noqa: PLC0415 (start-up time: torch)

    done = compact_store(path)
    text = (
        f"{counted(done.parts_before, 'part')} with {counted(done.rows_before, 'row')} became "
        f"{counted(done.parts_after, 'part')} with {counted(done.rows_after, 'row')}"
    )
    answer(as_json, asdict(done), text)


@store_app.command("export")
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
    """Write the scores into one .csv, .jsonl or .parquet file.

    One row per checkpoint, its metadata as columns; with --table layers one row per layer.

    \b
    Examples:
      lipfast store export scores/ scores.csv
      lipfast store export scores/ layers.parquet --table layers
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import export_scores  # noqa: PLC0415 (start-up time: torch)

    rows = export_scores(path, to, cast("Any", table), overwrite=overwrite)
    value = {"file": to, "table": table, "rows": rows}
    answer(as_json, value, f"{counted(rows, 'row')} written to {to}")
