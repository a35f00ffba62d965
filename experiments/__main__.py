"""Command line of the studies: `python -m experiments list | run | figure`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from experiments.analysis import WidthSummary, neighbouring, peak_widths, summarise
from experiments.config import SweepConfig, describe_sweep, find_sweep, load_config, sweep_names
from experiments.sweep import SweepFolder, TrainingSummary, open_sweep, train_sweep
from lipfast.errors import LipfastError, StoreError
from lipfast.scoring.summary import counted

if TYPE_CHECKING:
    import pyarrow as pa

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130
_REPOSITORY = Path(__file__).parent.parent

app = typer.Typer(
    help="Train sweeps of small networks, bound their Lipschitz constants, draw the result.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
_Sweep = Annotated[
    str,
    typer.Argument(
        help="Name of a sweep (see the list command), or a .toml file.", metavar="SWEEP"
    ),
]
_Scale = Annotated[str, typer.Option(help="Which of the sweep's scales.", metavar="SCALE")]
_Out = Annotated[
    Path, typer.Option(help="Folder of all sweeps; each has its own inside.", metavar="DIR")
]
_Force = Annotated[
    bool, typer.Option("--force", help="Delete what an earlier run of this sweep left, start anew.")
]

_LIST_HELP = """List the sweeps and their scales.

\b
Example:
  python -m experiments list
"""

_RUN_HELP = """Train a sweep, score its checkpoints and draw the figures.

Stopped at any moment, the same command goes on where it was.

\b
Examples:
  python -m experiments run double-descent --scale tiny
  python -m experiments run my-sweep.toml --scale small --out runs

\b
Exit codes:
  0    done
  1    a checkpoint could not be scored, or something failed
  2    the arguments or the settings are wrong
  130  interrupted
"""

_FIGURE_HELP = """Draw the figures of a sweep that has been run, from its scores.

\b
Example:
  python -m experiments figure double-descent --scale demo
"""


def _here(path: str | Path) -> str:
    """Return a path relative to the current folder where it lies inside, else as it is."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return str(path)


def shown_command(*arguments: str) -> str:
    """Return a command of this interpreter as a user would type it in the current folder.

    Args:
        arguments: after the interpreter: `-m`, the module, and its arguments.
    """
    _, module, *rest = arguments
    script = Path(sys.executable).with_name(module)
    if module == "lipfast" and script.is_file():
        return shlex.join([_here(script), *rest])
    return shlex.join([_here(sys.executable), *arguments])


def score_command(folder: SweepFolder) -> list[str]:
    """Return the `lipfast score` command that scores the checkpoints of a sweep."""
    return [
        sys.executable,
        *("-m", "lipfast", "score", _here(folder.checkpoints)),
        *("--arch", "experiments.models:fcn"),
        *("--data", f"{_here(folder.data)}:x_train"),
        *("--out", _here(folder.scores)),
    ]


def _score(folder: SweepFolder) -> int:
    """Run `lipfast score` and return its exit status: 0, or 1 when checkpoints failed.

    Raises:
        KeyboardInterrupt: it was interrupted.
        LipfastError: it could not score at all.
    """
    command = score_command(folder)
    environment = dict(os.environ)
    shown = shown_command(*command[1:])
    if not Path.cwd().samefile(_REPOSITORY):
        # The scorer looks for experiments.models in the current folder.
        before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        path = os.pathsep.join(dict.fromkeys([str(_REPOSITORY), *filter(None, before)]))
        environment["PYTHONPATH"] = path
        shown = f"PYTHONPATH={shlex.quote(path)} {shown}"
    print(f"$ {shown}", flush=True)
    with subprocess.Popen(command, env=environment) as process:
        # Ctrl-C reaches the scorer too, which saves what is done and ends by itself: wait for it.
        while process.poll() is None:
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
    status = process.returncode
    if status in {_EXIT_INTERRUPTED, -signal.SIGINT}:
        raise KeyboardInterrupt
    if status not in {0, _EXIT_FAILED}:
        raise LipfastError(f"lipfast score ended with status {status}; its message is above")
    return status


def _read_scores(folder: SweepFolder) -> pa.Table:
    import lipfast  # noqa: PLC0415  # training does not need the native extension

    return lipfast.read_scores(folder.scores)


def _print_table(summary: WidthSummary) -> None:
    columns = {
        "train loss": ("train_loss", ".4f"),
        "test loss": ("test_loss", ".2f"),
        "lower": ("lower", ".2f"),
        "mean": ("mean", ".2f"),
        "upper": ("upper", ".2f"),
    }
    table = Table(title=f"Last step, mean over {counted(int(summary.seeds.max()), 'seed')}")
    for heading in ("width", *columns):
        table.add_column(heading, justify="right")
    for index, width in enumerate(summary.widths):
        values = [format(summary.mean[name][index], digits) for name, digits in columns.values()]
        table.add_row(str(width), *values)
    Console().print(table)


def _print_peaks(summary: WidthSummary) -> None:
    peaks = peak_widths(summary)
    test = peaks["test_loss"]
    print(f"peak of the test loss: width {test}")
    for name in ("lower", "upper"):
        width = peaks[name]
        if width == test:
            place = "the same width"
        elif neighbouring(summary.widths, width, test):
            place = "a neighbouring width"
        else:
            place = "NOT at the same or a neighbouring width"
        print(f"peak of the {name} bound: width {width} ({place})")
    aligned = all(neighbouring(summary.widths, peaks[name], test) for name in ("lower", "upper"))
    print(f"peaks aligned: {'yes' if aligned else 'no'}")


def _draw(config: SweepConfig, folder: SweepFolder, table: pa.Table) -> None:
    from experiments.figures import draw_sweep  # noqa: PLC0415  # importing matplotlib takes long

    for path in draw_sweep(table, config, folder.root):
        print(f"wrote {path}")


def _print_training(summary: TrainingSummary) -> None:
    print(
        f"{summary.trained} runs trained, {summary.skipped} complete already, "
        f"{summary.checkpoints} checkpoints, {summary.seconds:.1f} s"
    )
    if summary.diverged:
        print(f"diverged (NaN or infinite, left out): {', '.join(summary.diverged)}")


def _train_score_draw(config: SweepConfig, folder: SweepFolder) -> int:
    """Do all that `run` does in the folder and return its exit status."""
    training = train_sweep(config, folder)
    _print_training(training)
    if len(training.diverged) == training.trained + training.skipped:
        raise LipfastError("every run diverged, so there is nothing to draw: choose a smaller lr")
    started = time.perf_counter()
    status = _score(folder)
    print(f"scored in {time.perf_counter() - started:.1f} s")
    started = time.perf_counter()
    table = _read_scores(folder)
    summary = summarise(table)
    _print_table(summary)
    _draw(config, folder, table)
    print(f"read and drawn in {time.perf_counter() - started:.1f} s")
    _print_peaks(summary)
    if status != 0:
        print(
            "error: some checkpoints could not be scored; lipfast score says which, above",
            file=sys.stderr,
        )
    return status


def _run_command(sweep: str, scale: str, out: Path) -> str:
    command = ["-m", "experiments", "run", sweep, "--scale", scale, "--out", str(out)]
    return shown_command(*command)


@app.command("list", help=_LIST_HELP)
def list_sweeps() -> None:
    """List the sweeps and their scales."""
    for name in sweep_names():
        description, scales = describe_sweep(name)
        print(f"{name} ({', '.join(scales)}): {description}")


@app.command(help=_RUN_HELP)
def run(
    sweep: _Sweep, scale: _Scale = "demo", out: _Out = Path("runs"), force: _Force = False
) -> None:
    """Train a sweep, score its checkpoints and draw the figures."""
    name, configs = find_sweep(sweep)
    config = load_config(name, scale, configs)
    folder = open_sweep(config, out, force=force)
    print(f"sweep {name}, scale {scale}, in {folder.root}", flush=True)
    try:
        status = _train_score_draw(config, folder)
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept. To go on:", file=sys.stderr)
        print(f"  {_run_command(sweep, scale, out)}", file=sys.stderr)
        status = _EXIT_INTERRUPTED
    raise typer.Exit(status)


@app.command(help=_FIGURE_HELP)
def figure(sweep: _Sweep, scale: _Scale = "demo", out: _Out = Path("runs")) -> None:
    """Draw the figures of a sweep that has been run, from its scores."""
    name, configs = find_sweep(sweep)
    config = load_config(name, scale, configs)
    folder = SweepFolder(out / f"{name}-{scale}")
    if not folder.scores.is_dir():
        raise StoreError(f"{folder.scores} does not exist; run: {_run_command(sweep, scale, out)}")
    _draw(config, folder, _read_scores(folder))


def main() -> None:
    """Run the command line; errors made on purpose are one line on stderr."""
    try:
        app()
    except LipfastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_EXIT_USAGE if isinstance(error, ValueError) else _EXIT_FAILED)
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "mnist1d", "tomli"}:
            raise
        print(
            f"error: {error.name} is not installed; run: pip install 'lipfast[experiments]'",
            file=sys.stderr,
        )
        sys.exit(_EXIT_FAILED)


if __name__ == "__main__":
    main()
