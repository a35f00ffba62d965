"""The command `lipfast score`."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from lipfast.cli import options, terminal
from lipfast.cli.progress import progress_bar


@terminal.handle_errors
def score(
    archive: Annotated[
        list[str], typer.Argument(help="Where the checkpoints are.", metavar="ARCHIVE")
    ],
    *,
    arch: options.ArchOption,
    data: Annotated[
        str,
        typer.Option(
            help="Samples: FILE[:KEY] (.safetensors, .npz, .npy, .pt; key x by default), "
            "mnist1d:train or mnist1d:test.",
            metavar="DATA",
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the store.", metavar="DIR")],
    arch_arg: options.ArchArgsOption = None,
    norm: options.NormOption = "2",
    upper: Annotated[
        str,
        typer.Option(
            help="Of upper bounds: product (of norms) or quadratic (constraints: tighter; norm 2).",
            metavar="METHOD",
        ),
    ] = "product",
    seed: options.SeedOption = 0,
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
    prefix: options.PrefixOption = None,
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
        typer.Option(
            help="Of --engine ray: CPUs, or with --device cuda GPUs; by default all that are free.",
            min=1,
            metavar="N",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Checkpoints per call; by default 64, with --device cuda 1024.", min=1, metavar="N"
        ),
    ] = None,
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "cpu",
    memory: Annotated[
        str,
        typer.Option(help="Checkpoints to hold at most, such as 512M or 4G.", metavar="BYTES"),
    ] = "1G",
    as_json: options.JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Read and check, say how long scoring would take; write nothing.",
        ),
    ] = False,
) -> None:
    """Score every checkpoint of an archive.

    ARCHIVE is a file, a folder (searched recursively), a glob, a .zip or .tar file, a manifest
    (.csv or .jsonl) or an fsspec URL of .safetensors, .pt, .pth or .ckpt files; several may be
    given. Checkpoints that the store has already are skipped, so the same command resumes an
    interrupted run.

    \b
    Examples:
      lipfast score runs/ --arch models:mlp --data mnist1d:train --out scores/
      lipfast score runs/ --arch models:mlp --arch-arg depth=2 --data x.safetensors:x_train --out s/
      lipfast score 'runs/seed*/last.pt' --arch model.pt2 --data x.npy --out scores/ --json
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --pattern '{run}/step_{step:d}.pt'
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --where 'step >= 1000' --every 10
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --upper quadratic
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --prefix ema
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --watch
      lipfast score runs/ --arch models:mlp --data x.npy --out s/ --device cuda

    \b
    Exit codes:
      0    every checkpoint was scored, or had been before
      1    some checkpoints failed, now or before: they are rows with status "error"
      2    wrong usage or input, or the store cannot be read or written
      130  interrupted; what was done is kept, the same command resumes
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import pipeline  # noqa: PLC0415 (start-up time: torch)
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415 (start-up time: torch)

    try:
        with (
            options.computing(threads),
            _interruptible(),
            progress_bar(quiet) as report,
        ):
            summary = pipeline.score(
                archive,
                arch=arch,
                data=data,
                out=out,
                norm=options.parse_norm(norm),
                upper=upper,  # type: ignore[arg-type]  # checked there
                seed=seed,
                limit=limit,
                batch_size=batch_size,
                memory=options.parse_bytes(memory),
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
                device=device,
                progress=report,
            )
    except KeyboardInterrupt as interrupt:
        if isinstance(interrupt, pipeline.Interrupted) and not quiet:
            terminal.say(str(interrupt.summary))
        terminal.say("lipfast: interrupted; what was done is kept. To go on:")
        terminal.say(f"  {this_command()}")
        raise typer.Exit(terminal.EXIT_INTERRUPTED) from None
    if as_json:
        terminal.print_json(summary.to_dict())
    elif not quiet:
        typer.echo(terminal.clean(str(summary)))
    if summary.failed or summary.failed_before:
        raise typer.Exit(terminal.EXIT_FAILED)


@contextmanager
def _interruptible() -> Iterator[None]:
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


def this_command() -> str:
    """Return what was typed, to be typed again."""
    program = "lipfast"
    typed = Path(sys.argv[0])
    if typed.name == program and typed.parent.parts and not typed.is_absolute():
        program = shlex.quote(str(typed))  # such as .venv/bin/lipfast, which is not on the path
    if Path(sys.argv[0]).name == "__main__.py":
        program = f"{Path(sys.executable).name} -m lipfast"
    return f"{program} {shlex.join(sys.argv[1:])}"
