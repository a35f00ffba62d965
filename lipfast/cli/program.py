"""The command line: arguments in, calls of the library, text or JSON out."""

from __future__ import annotations

import logging
import math
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lipfast._version import __version__
from lipfast.cli.store import store_app
from lipfast.errors import ArgumentError
from lipfast.cli.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Json,
    clean,
    handle_errors,
    print_json,
    say,
)

if TYPE_CHECKING:
    from lipfast.scoring import Progress

# torch takes a second to import: each command imports what it needs, and --help nothing of it.

_EXIT_CODES = """\b
Exit codes:
  0    every checkpoint was scored, or had been before
  1    some checkpoints failed, now or before: they are rows with status "error"
  2    wrong usage or input, or the store cannot be read or written
  130  interrupted; what was done is kept, the same command resumes
"""

app = typer.Typer(
    name="lipfast",
    help="Certified bounds on the Lipschitz constant of neural networks, for many checkpoints.",
    epilog="""\b
Examples:
  lipfast bounds run/last.safetensors --arch models:mlp --data x.npy
  lipfast score runs/ --arch models:mlp --data x.npy --out scores/
  lipfast store show scores/

'lipfast COMMAND --help' says more. Results go to stdout, progress and errors to stderr.""",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(store_app, name="store")

Arch = Annotated[
    str,
    typer.Option(
        help="module:function (the current folder is importable), or a model.pt2 file. Keyword "
        "arguments are taken from each checkpoint's metadata.",
        metavar="ARCH",
    ),
]
ArchArgs = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", help="Keyword argument of the architecture.", metavar="KEY=VALUE"),
]
Norm = Annotated[str, typer.Option(help="Norm of inputs and outputs: 1, 2 or inf.", metavar="NORM")]
Seed = Annotated[int, typer.Option(help="Seed of the start vectors.", metavar="N", min=0)]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads; by default as torch has it.", min=1, metavar="N"),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu.", metavar="DEVICE")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Answer `--version`."""
    if version:
        typer.echo(f"lipfast {__version__}")
        raise typer.Exit


_SCORE_HELP = f"""Score every checkpoint of an archive.

ARCHIVE is a file, a folder (searched recursively), a glob, a .zip or .tar file, a manifest
(.csv or .jsonl) or an fsspec URL of .safetensors, .pt, .pth or .ckpt files; several may be given.
Checkpoints that the store has already are skipped, so the same command resumes an interrupted run.

\b
Examples:
  lipfast score runs/ --arch models:mlp --data mnist1d:train --out scores/
  lipfast score runs/ --arch models:mlp --arch-arg depth=2 --data x.safetensors:x_train --out s/
  lipfast score 'runs/seed*/last.pt' --arch model.pt2 --data x.npy --out scores/ --json
  lipfast score runs/ --arch models:mlp --data x.npy --out s/ --pattern '{{run}}/step_{{step:d}}.pt'
  lipfast score runs/ --arch models:mlp --data x.npy --out s/ --where 'step >= 1000' --every 10
  lipfast score runs/ --arch models:mlp --data x.npy --out s/ --watch

{_EXIT_CODES}"""


@app.command(help=_SCORE_HELP)
@handle_errors
def score(
    archive: Annotated[
        list[str], typer.Argument(help="Where the checkpoints are.", metavar="ARCHIVE")
    ],
    *,
    arch: Arch,
    data: Annotated[
        str,
        typer.Option(
            help="Samples: FILE[:KEY] (.safetensors, .npz, .npy, .pt; key x by default), "
            "mnist1d:train or mnist1d:test.",
            metavar="DATA",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the store.", metavar="DIR")],
    arch_arg: ArchArgs = None,
    norm: Norm = "2",
    seed: Seed = 0,
    limit: Annotated[
        int | None, typer.Option(help="Score at most so many checkpoints.", min=1, metavar="N")
    ] = None,
    every: Annotated[
        int,
        typer.Option(
            help="Of each run, the first checkpoint and every N-th after it.", min=1, metavar="N"
        ),
    ] = 1,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only checkpoints whose metadata satisfy this.", metavar="KEY<OP>VALUE"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Metadata from paths: '{run}/step_{step:d}.pt'.", metavar="PATTERN"),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(help="Of the names of the weights that are scored.", metavar="NAME"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try failed checkpoints again.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep looking for new checkpoints until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option(help="Seconds between looks of --watch.", min=0.1, metavar="SECONDS")
    ] = 10.0,
    engine: Annotated[
        str, typer.Option(help="local, or ray (extra lipfast[ray]).", metavar="ENGINE")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="Of --engine ray; by default one per CPU.", min=1, metavar="N"),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Checkpoints per call.", min=1, metavar="N")] = 64,
    threads: Threads = None,
    device: Device = "cpu",
    memory: Annotated[
        str,
        typer.Option(help="Checkpoints to hold at most, such as 512M or 4G.", metavar="BYTES"),
    ] = "1G",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Read and check, say how long scoring would take; write nothing."
        ),
    ] = False,
) -> None:
    """Score every checkpoint of an archive."""
    from lipfast.scoring import pipeline  # noqa: PLC0415
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415

    _check_device(device)
    try:
        with _threads(threads), _terminated_as_interrupted(), _progress_bar(quiet) as report:
            summary = pipeline.score(
                archive,
                arch=arch,
                data=data,
                out=out,
                norm=parse_norm(norm),
                seed=seed,
                limit=limit,
                batch_size=batch_size,
                memory=parse_bytes(memory),
                arch_args=parse_arguments(arch_arg or []),
                dry_run=dry_run,
                every=every,
                where=where or [],
                pattern=pattern,
                prefix=prefix,
                retry_failed=retry_failed,
                watch=interval if watch else None,
                engine=engine,
                workers=workers,
                progress=report,
            )
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, pipeline.Interrupted) and not quiet:
            say(str(interrupt.summary))
        say("lipfast: interrupted; what was done is kept. To go on:")
        say(f"  {_this_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print_json(summary.to_dict())
    elif not quiet:
        typer.echo(clean(str(summary)))
    if summary.failed or summary.failed_before:
        raise typer.Exit(EXIT_FAILED)


_BOUNDS_HELP = """Bound one checkpoint and print its layers.

Without --data only the upper bound is computed.

\b
Examples:
  lipfast bounds run/last.safetensors --arch models:mlp --data mnist1d:train
  lipfast bounds run/last.pt --arch models:cnn --arch-arg width=16 --input-shape 3,32,32 --json

\b
Exit codes:
  0    done
  2    wrong usage or input
  130  interrupted
"""


@app.command(help=_BOUNDS_HELP)
@handle_errors
def bounds(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors, .pt or .pth file or URL.", metavar="CHECKPOINT"),
    ],
    *,
    arch: Arch,
    data: Annotated[
        str | None, typer.Option(help="Samples, as for 'lipfast score'.", metavar="DATA")
    ] = None,
    arch_arg: ArchArgs = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one sample, without --data.", metavar="N,N,...")
    ] = None,
    norm: Norm = "2",
    seed: Seed = 0,
    threads: Threads = None,
    device: Device = "cpu",
    explain: Annotated[
        bool, typer.Option("--explain", help="Also print how the upper bound is composed.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bound one checkpoint and print its layers."""
    from lipfast.scoring import show  # noqa: PLC0415
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415
    from lipfast.scoring.single import bound_checkpoint  # noqa: PLC0415

    _check_device(device)
    with _threads(threads):
        read, found = bound_checkpoint(
            checkpoint,
            arch=arch,
            data=data,
            arch_args=parse_arguments(arch_arg or []),
            input_shape=None if input_shape is None else parse_shape(input_shape),
            norm=parse_norm(norm),
            seed=seed,
        )
    if as_json:
        print_json(show.bounds_json(read, found))
    else:
        typer.echo(clean(show.bounds_text(read, found)))
        if explain:
            typer.echo(clean(f"\n{found.explain()}"))


_INFO_HELP = """Print versions, CPU capability, threads and what was built.

\b
Example:
  lipfast info --json
"""


@app.command(help=_INFO_HELP)
@handle_errors
def info(as_json: Json = False) -> None:
    """Print versions, capability, threads and what was built."""
    import lipfast  # noqa: PLC0415

    found = lipfast.info()
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(clean(str(found)))


def parse_norm(text: str) -> float:
    """Parse `1`, `2` or `inf`.

    Raises:
        ArgumentError: it is something else.
    """
    norms = {"1": 1, "2": 2, "inf": math.inf}
    if text not in norms:
        raise ArgumentError(f"--norm {text}: expected 1, 2 or inf")
    return norms[text]


def parse_bytes(text: str) -> int:
    """Parse a number of bytes, perhaps with K, M, G or T (powers of 1024).

    Raises:
        ArgumentError: it is something else, or less than one byte.

    Example:
        >>> parse_bytes("512M")
        536870912
    """
    number = text.strip().upper().removesuffix("B").removesuffix("I")
    power = " KMGT".find(number[-1:]) if number[-1:] in ("K", "M", "G", "T") else 0
    try:
        size = float(number[:-1] if power else number) * 1024**power
        if not 1 <= size < math.inf:
            raise ValueError
    except ValueError:
        raise ArgumentError(f"--memory {text}: expected bytes, such as 512M or 4G") from None
    return int(size)


def parse_shape(text: str) -> tuple[int, ...]:
    """Parse sizes with commas between them.

    Raises:
        ArgumentError: one of them is not a positive integer.

    Example:
        >>> parse_shape("3,32,32")
        (3, 32, 32)
    """
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise ArgumentError(f"--input-shape {text}: expected sizes such as 3,32,32")
    return tuple(int(size) for size in sizes)


def _check_device(device: str) -> None:
    if device != "cpu":
        raise ArgumentError(f"--device {device}: this version computes on cpu only")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch  # noqa: PLC0415

    most = 4 * (os.cpu_count() or 1)
    if count is not None and count > most:  # far more end in a crash of the thread library
        raise ArgumentError(f"--threads {count}: expected at most {most} on this machine")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, ends a run as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread may have handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _progress_bar(quiet: bool) -> Any:
    """Return a context that gives a callback; None where nobody would see the bar."""
    return nullcontext(None) if quiet or not sys.stderr.isatty() else _rich_progress()


@contextmanager
def _rich_progress() -> Iterator[Callable[[Progress], None]]:
    from rich import progress  # noqa: PLC0415
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[failed]}"),
    )
    # The stream itself: tracing turns sys.stderr aside for a while.
    console = Console(file=sys.stderr)
    with progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading", total=None, rate="", failed="")

        def report(at: Progress) -> None:
            elapsed = bar.tasks[task].elapsed or 0.0
            bar.update(
                task,
                description="scoring",
                completed=at.done,
                total=at.total,
                rate=f"{at.done / elapsed:.3g}/s" if elapsed > 0 else "",
                failed=f"{at.failed} failed" if at.failed else "",
            )

        yield report


def _this_command() -> str:
    program = "lipfast"
    typed = Path(sys.argv[0])
    if typed.name == program and typed.parent.parts and not typed.is_absolute():
        program = shlex.quote(str(typed))  # such as .venv/bin/lipfast, which is not on the path
    if Path(sys.argv[0]).name == "__main__.py":
        program = f"{Path(sys.executable).name} -m lipfast"
    return f"{program} {shlex.join(sys.argv[1:])}"


def main() -> None:
    """Run the command line."""
    # torch warns of its own deprecations while it reads old files: nothing that a user can mend.
    warnings.filterwarnings("ignore", module=r"torch\b")
    # File systems log the errors, with tracebacks, that lipfast reports itself in a line.
    logging.getLogger().addHandler(logging.NullHandler())
    app(prog_name="lipfast")


