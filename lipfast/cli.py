"""The command line: arguments in, calls of the library, text or JSON out."""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from lipfast._version import __version__
from lipfast.errors import ArgumentError, LipfastError

if TYPE_CHECKING:
    from lipfast.scoring import Progress

# torch takes a second to import: each command imports what it needs, and --help nothing of it.

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

_EXIT_CODES = """\b
Exit codes:
  0    every checkpoint was scored, or had been before
  1    some checkpoints failed: they are rows with status "error"
  2    wrong usage or input, or the store cannot be read or written
  130  interrupted; what was done is kept, the same command resumes
"""

Function = TypeVar("Function", bound=Callable[..., None])

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
store_app = typer.Typer(
    help="Look at a store of scores.",
    epilog="""\b
Examples:
  lipfast store show scores/
  lipfast store verify scores/""",
    no_args_is_help=True,
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
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def handle_errors(function: Function) -> Function:
    """Turn errors that lipfast raises on purpose into one message and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except LipfastError as error:
            _say(f"lipfast: error: {error}")
            raise typer.Exit(EXIT_USAGE) from None
        except BrokenPipeError:
            raise  # whoever read stdout has seen enough: typer ends quietly
        except OSError as error:
            _say(f"lipfast: error: {error}")
            raise typer.Exit(EXIT_USAGE) from None
        except KeyboardInterrupt:
            _say("lipfast: interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Answer `--version`."""
    if version:
        typer.echo(f"lipfast {__version__}")
        raise typer.Exit


_SCORE_HELP = f"""Score every checkpoint of an archive.

ARCHIVE is a file, a folder (searched recursively), a glob or an fsspec URL of .safetensors, .pt
or .pth files; several may be given. Checkpoints that the store has already are skipped, so the
same command resumes an interrupted run.

\b
Examples:
  lipfast score runs/ --arch models:mlp --data mnist1d:train --out scores/
  lipfast score runs/ --arch models:mlp --arch-arg depth=2 --data x.safetensors:x_train --out s/
  lipfast score 'runs/seed*/last.pt' --arch model.pt2 --data x.npy --out scores/ --json

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
        bool, typer.Option("--dry-run", help="Read and check only; compute and write nothing.")
    ] = False,
) -> None:
    """Score every checkpoint of an archive."""
    from lipfast.scoring import pipeline  # noqa: PLC0415
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415

    _check_device(device)
    try:
        with _threads(threads), _progress_bar(quiet) as report:
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
                progress=report,
            )
    except KeyboardInterrupt:
        _say("lipfast: interrupted; what was done is kept. To go on:")
        _say(f"  {_this_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        _print_json(summary.to_dict())
    elif not quiet:
        typer.echo(_clean(str(summary)))
    if summary.failed:
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
        _print_json(show.bounds_json(read, found))
    else:
        typer.echo(_clean(show.bounds_text(read, found)))


_SHOW_HELP = """Print counts, failures and the newest checkpoint per run.

\b
Examples:
  lipfast store show scores/
  lipfast store show scores/ --json
"""


@store_app.command("show", help=_SHOW_HELP)
@handle_errors
def store_show(
    path: Annotated[str, typer.Argument(help="Folder of the store.", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Print a short summary of a store."""
    from lipfast.scoring import show  # noqa: PLC0415

    overview = show.store_overview(path)
    if as_json:
        _print_json(overview)
    else:
        typer.echo(_clean(show.overview_text(overview)))


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
    path: Annotated[str, typer.Argument(help="Folder of the store.", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Read every part of a store and check it."""
    from lipfast.scoring import verify_store  # noqa: PLC0415
    from lipfast.scoring.summary import counted  # noqa: PLC0415

    found = verify_store(path)
    if as_json:
        _print_json({"parts": found.parts, "rows": found.rows, "problems": list(found.problems)})
    else:
        verdict = counted(len(found.problems), "problem") if found.problems else "sound"
        typer.echo(f"{counted(found.parts, 'part')}, {counted(found.rows, 'row')}: {verdict}")
        for problem in found.problems:
            typer.echo(_clean(f"  {problem}"))
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


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
        _print_json(found.to_dict())
    else:
        typer.echo(_clean(str(found)))


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


def _clean(text: str) -> str:
    from lipfast.checkpoints.text import printable  # noqa: PLC0415

    return printable(text, newlines=True)


def _say(text: str) -> None:
    typer.echo(_clean(text), err=True)


def _print_json(value: Any) -> None:
    from lipfast.scoring.show import strict_json  # noqa: PLC0415

    typer.echo(json.dumps(strict_json(value), indent=1, default=str))


def main() -> None:
    """Run the command line."""
    # torch warns of its own deprecations while it reads old files: nothing that a user can mend.
    warnings.filterwarnings("ignore", module=r"torch\b")
    app(prog_name="lipfast")


if __name__ == "__main__":
    main()
