"""Command line of the studies: `python -m experiments list | run | collect | figure | report`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, get_args

import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table

import lipfast
from experiments.analysis import WidthSummary, neighbouring, peak_widths, summarise
from experiments.brackets import Bracket, final_brackets, tightness, tightness_lines
from experiments.config import SweepConfig
from experiments.results import RESULTS_FOLDER
from experiments.study import (
    Study,
    describe_sweep,
    find_sweep,
    load_config,
    load_study,
    studies_of,
    sweep_names,
)
from experiments.sweep import (
    ENGINES,
    SweepFolder,
    TrainingSummary,
    found_folder,
    open_sweep,
    sweep_folder,
    train_sweeps,
)
from lipfast.errors import ArgumentError, LipfastError, StoreError
from lipfast.estimators.options import UpperMethod
from lipfast.text import counted

_EXIT_FAILED = 1
_EXIT_USAGE = 2
_EXIT_INTERRUPTED = 130

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
_ResultsFolder = Annotated[
    Path | None,
    typer.Option("--results", help="Folder of results.", metavar="DIR", show_default=False),
]
_Force = Annotated[
    bool, typer.Option("--force", help="Delete what an earlier run of this sweep left, start anew.")
]
_Engine = Annotated[
    str,
    typer.Option(
        help="local: threads of this process; ray: a Ray cluster (extra lipfast[ray]).",
        metavar="ENGINE",
    ),
]
_Upper = Annotated[
    str,
    typer.Option(
        help="Method of upper bounds, product or quadratic; by default what the settings say.",
        metavar="METHOD",
        show_default=False,
    ),
]

_LIST_HELP = """List the studies and their scales.

\b
Example:
  python -m experiments list
"""

_RUN_HELP = """Train the sweeps of a study and of those that it uses, score them, draw.

Stopped at any moment, the same command goes on where it was.

\b
Examples:
  python -m experiments run double-descent --scale tiny
  python -m experiments run C1-width-fcn-ce --scale laptop
  python -m experiments run C1-width-fcn-ce --scale laptop --upper quadratic
  python -m experiments run my-sweep.toml --scale small --out runs
  python -m experiments run C3-width-cnn --scale paper --out /shared/runs --engine ray

\b
Exit codes:
  0    done
  1    a checkpoint could not be scored, or something failed
  2    the arguments or the settings are wrong
  130  interrupted
"""

_COLLECT_HELP = """Reduce the runs of a study to its small file of results, say what they show.

\b
Example:
  python -m experiments collect C1-width-fcn-ce --scale laptop
"""

_FIGURE_HELP = """Draw the figure of a study from its results, or those of a sweep from its scores.

A study with a section in the report needs no run: its results are in experiments/results.

\b
Examples:
  python -m experiments figure C1-width-fcn-ce
  python -m experiments figure double-descent --scale demo
"""

_REPORT_HELP = """Write docs/study.md and its figures from stored results; nothing is trained.

\b
Example:
  python -m experiments report
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


def _engine_option(engine: str) -> list[str]:
    return [] if engine == "local" else ["--engine", engine]


def score_command(config: SweepConfig, folder: SweepFolder, engine: str = "local") -> list[str]:
    """Return the `lipfast score` command that scores the checkpoints of a sweep."""
    return [
        sys.executable,
        *("-m", "lipfast", "score", _here(folder.checkpoints)),
        *("--arch", f"experiments.models:{config.model}"),
        *("--data", f"{_here(folder.data)}:x_train"),
        *("--out", _here(folder.scores)),
        *([] if config.upper == "product" else ["--upper", config.upper]),
        *_engine_option(engine),
    ]


def _score(config: SweepConfig, folder: SweepFolder, engine: str = "local") -> int:
    """Score the checkpoints of a sweep, as `score_command` does; return the number of failures.

    Raises:
        KeyboardInterrupt: it was interrupted; what was done is kept.
        LipfastError: it could not score at all.
    """
    print(f"$ {shown_command(*score_command(config, folder, engine)[1:])}", flush=True)
    summary = lipfast.score(
        str(folder.checkpoints),
        arch=f"experiments.models:{config.model}",
        data=f"{folder.data}:x_train",
        out=folder.scores,
        engine=engine,
        upper=config.upper,
    )
    return summary.failed + summary.failed_before


def _read_scores(folder: SweepFolder) -> pa.Table:
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


def _brackets(folder: SweepFolder, table: pa.Table) -> list[Bracket]:
    """All that bounds the last networks, where they were scored with quadratic constraints."""
    return final_brackets(folder, table) if folder.upper == "quadratic" else []


def _draw_figures(
    config: SweepConfig, folder: SweepFolder, table: pa.Table, brackets: list[Bracket]
) -> None:
    from experiments.figures import draw_sweep  # noqa: PLC0415  # matplotlib: a slow extra

    for path in draw_sweep(table, config, folder.root, brackets):
        print(f"wrote {path}")


def _print_training(summary: TrainingSummary) -> None:
    print(
        f"{summary.trained} runs trained, {summary.skipped} complete already, "
        f"{summary.checkpoints} checkpoints, {summary.seconds:.1f} s"
    )
    if summary.diverged:
        print(f"diverged (NaN or infinite, left out): {', '.join(summary.diverged)}")


def _is_plain(study: Study) -> bool:
    """Whether the study is one sweep over widths that all end at the same step, on MNIST1D."""
    if len(study.sweeps) != 1 or study.uses:
        return False
    (config,) = study.sweeps
    plain = (config.model, config.data) == ("fcn", "mnist1d") and not config.stops_early
    return plain and len(config.widths) > 1


def _show(config: SweepConfig, folder: SweepFolder) -> None:
    """Print the table of a sweep over widths, draw its figures, say where the peaks are."""
    table = _read_scores(folder)
    summary = summarise(table)
    brackets = _brackets(folder, table)
    _print_table(summary)
    _draw_figures(config, folder, table, brackets)
    if brackets:
        print("\n".join(tightness_lines(tightness(brackets, table))))
    _print_peaks(summary)


def _train_score_draw(
    study: Study, sweeps: list[tuple[SweepConfig, SweepFolder]], engine: str
) -> int:
    """Do all that `run` does and return its exit status."""
    training = train_sweeps(sweeps, engine)
    _print_training(training)
    if len(training.diverged) == training.trained + training.skipped:
        raise LipfastError("every run diverged, so there is nothing to draw: choose a smaller lr")
    started = time.perf_counter()
    failures = sum(_score(config, folder, engine) for config, folder in sweeps)
    print(f"scored in {time.perf_counter() - started:.1f} s")
    if _is_plain(study):
        _show(study.sweeps[0], sweeps[-1][1])
    if failures:
        print(
            "error: some checkpoints could not be scored; the column 'error' of the store says why",
            file=sys.stderr,
        )
    return _EXIT_FAILED if failures else 0


def _named(sweep: str, scale: str) -> tuple[str, str, Path]:
    """The arguments of `load_study`."""
    name, configs = find_sweep(sweep)
    return name, scale, configs


def _run_command(sweep: str, scale: str, out: Path, engine: str = "local", upper: str = "") -> str:
    command = ["-m", "experiments", "run", sweep, "--scale", scale, "--out", str(out)]
    command += ["--upper", upper] if upper else []
    return shown_command(*command, *_engine_option(engine))


def _with_upper(config: SweepConfig, upper: str) -> SweepConfig:
    """The settings with the method of upper bounds that the command names, if it names one."""
    return dataclasses.replace(config, upper=upper) if upper else config  # type: ignore[arg-type]


@app.command("list", help=_LIST_HELP)
def list_sweeps() -> None:
    """List the studies and their scales."""
    for name in sweep_names():
        description, scales = describe_sweep(name)
        print(f"{name} ({', '.join(scales)}): {description}")


@app.command(help=_RUN_HELP)
def run(
    sweep: _Sweep,
    scale: _Scale = "demo",
    out: _Out = Path("runs"),
    *,
    force: _Force = False,
    engine: _Engine = "local",
    upper: _Upper = "",
) -> None:
    """Train the sweeps of a study, score their checkpoints and draw the figures."""
    if engine not in ENGINES:  # before --force deletes anything
        raise ArgumentError(f"--engine is '{engine}'; expected {' or '.join(ENGINES)}")
    methods = get_args(UpperMethod)
    if upper and upper not in methods:
        raise ArgumentError(f"--upper is '{upper}'; expected {' or '.join(methods)}")
    name, configs = find_sweep(sweep)
    study = load_study(name, scale, configs)
    used = [
        _with_upper(config, upper)
        for other in studies_of(study, configs)
        for config in other.sweeps
    ]
    own = {config.name for config in study.sweeps}
    sweeps = [
        (config, open_sweep(config, out, force=force and config.name in own)) for config in used
    ]
    places = dict.fromkeys(str(out / f"{config.name}-{scale}") for config, _ in sweeps)
    print(f"study {name}, scale {scale}, in {', '.join(places)}", flush=True)
    try:
        status = _train_score_draw(study, sweeps, engine)
    except KeyboardInterrupt:
        print("interrupted; what is complete is kept. To go on:", file=sys.stderr)
        print(f"  {_run_command(sweep, scale, out, engine, upper)}", file=sys.stderr)
        status = _EXIT_INTERRUPTED
    raise typer.Exit(status)


@app.command(help=_COLLECT_HELP)
def collect(
    sweep: _Sweep,
    scale: _Scale = "laptop",
    out: _Out = Path("runs"),
    results: _ResultsFolder = None,
) -> None:
    """Reduce the runs of a study to its small file of results."""
    from experiments import report as reports  # noqa: PLC0415  # matplotlib: a slow extra
    from experiments.collect import collect as collect_study  # noqa: PLC0415  # matplotlib, too

    study = load_study(*_named(sweep, scale))
    path = collect_study(study, out, results or RESULTS_FOLDER)
    print(f"wrote {_here(path)}")
    print("\n".join(reports.verdict_lines(study.name, path.parent)))


@app.command(help=_FIGURE_HELP)
def figure(
    sweep: _Sweep,
    scale: _Scale = "demo",
    out: _Out = Path("runs"),
    results: _ResultsFolder = None,
) -> None:
    """Draw the figure of a study from its results, or those of a sweep from its scores."""
    from experiments import report as reports  # noqa: PLC0415  # matplotlib: a slow extra

    name, configs = find_sweep(sweep)
    if reports.has_section(name):
        path = reports.draw_stored(name, results or RESULTS_FOLDER)
        print(f"wrote {_here(path)}")
        return
    config = load_config(name, scale, configs)
    folder = found_folder(sweep_folder(config, out).root)
    if not folder.scores.is_dir():
        raise StoreError(f"{folder.scores} does not exist; run: {_run_command(sweep, scale, out)}")
    table = _read_scores(folder)
    _draw_figures(config, folder, table, _brackets(folder, table))


@app.command(help=_REPORT_HELP)
def report(results: _ResultsFolder = None) -> None:
    """Write docs/study.md and its figures from stored results."""
    from experiments import report as reports  # noqa: PLC0415  # matplotlib: a slow extra

    sections = reports.build_report(results or RESULTS_FOLDER)
    for section in sections:
        print(f"{section.finding.id}: {section.verdict}")
    print(f"wrote {_here(reports.REPORT)}")


def main() -> None:
    """Run the command line; errors made on purpose are one line on stderr."""
    try:
        app()
    except LipfastError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(_EXIT_USAGE if isinstance(error, ValueError) else _EXIT_FAILED)
    except ModuleNotFoundError as error:
        if error.name not in {"matplotlib", "mlxtend", "mnist1d", "PIL", "sklearn", "tomli"}:
            raise
        print(
            f"error: {error.name} is not installed; run: pip install 'lipfast[experiments]'",
            file=sys.stderr,
        )
        sys.exit(_EXIT_FAILED)


if __name__ == "__main__":
    main()
