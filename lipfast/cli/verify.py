"""The command `lipfast verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lipfast.cli import options
from lipfast.cli.terminal import EXIT_FAILED, answer, handle_errors
from lipfast.errors import ArgumentError, LipfastError


@handle_errors
def verify(
    certificate: Annotated[
        str,
        typer.Argument(help="What 'lipfast bounds --certificate' wrote.", metavar="CERTIFICATE"),
    ],
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors, .pt or .pth file or URL.", metavar="CHECKPOINT"),
    ],
    *,
    arch: options.ArchOption,
    arch_arg: options.ArchArgsOption = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one sample.", metavar="N,N,...")
    ] = None,
    prefix: options.PrefixOption = None,
    threads: options.ThreadsOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Prove the upper bound of a checkpoint again, by a certificate that is not trusted.

    Nothing of the code that found the certificate is used. ('lipfast store verify' checks a store
    of scores.)

    \b
    Examples:
      lipfast verify last.json run/last.safetensors --arch models:mlp
      lipfast verify last.json run/last.pt --arch models:mlp --arch-arg width=16 --json

    \b
    Exit codes:
      0    the bound is proved
      1    the certificate proves no bound of this checkpoint: the reason is printed
      2    wrong usage or input
      130  interrupted
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import show  # noqa: PLC0415 (start-up time: torch)
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415 (start-up time: torch)
    from lipfast.scoring.single import check_certificate  # noqa: PLC0415 (start-up time: torch)

    if Path(certificate).is_dir():
        raise ArgumentError(f"'{certificate}' is a folder: a store has 'lipfast store verify'")
    with options.computing(threads):
        read, found = check_certificate(
            certificate,
            checkpoint,
            arch=arch,
            arch_args=parse_arguments(arch_arg or []),
            input_shape=None if input_shape is None else options.parse_shape(input_shape),
            prefix=prefix,
        )
    if isinstance(found, LipfastError):
        value = {"uri": read.file.uri, "proved": False, "reason": str(found)}
        answer(as_json, value, f"{read.file.uri}\n{found}")
        raise typer.Exit(EXIT_FAILED)
    answer(
        as_json,
        {"proved": True, **show.bounds_json(read, found)},
        f"{read.file.uri}\nproved: {found!r}" + (f" ({found.reason})" if found.reason else ""),
    )
