"""The command `lipfast bounds`."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from lipfast.cli import options
from lipfast.cli.terminal import answer, handle_errors


@handle_errors
def bounds(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A .safetensors, .pt or .pth file or URL.", metavar="CHECKPOINT"),
    ],
    *,
    arch: options.ArchOption,
    data: Annotated[
        str | None, typer.Option(help="Samples, as for 'lipfast score'.", metavar="DATA")
    ] = None,
    arch_arg: options.ArchArgsOption = None,
    input_shape: Annotated[
        str | None, typer.Option(help="Shape of one sample, without --data.", metavar="N,N,...")
    ] = None,
    prefix: options.PrefixOption = None,
    norm: options.NormOption = "2",
    seed: options.SeedOption = 0,
    threads: options.ThreadsOption = None,
    device: options.DeviceOption = "cpu",
    method: Annotated[
        str,
        typer.Option(
            help="Of the upper bound: product (of norms) or quadratic (constraints; norm 2).",
            metavar="METHOD",
        ),
    ] = "product",
    effort: Annotated[
        int,
        typer.Option(
            help="How long both --method quadratic and --floor search: 1, 2 or 3.", metavar="N"
        ),
    ] = 2,
    certificate: Annotated[
        str | None,
        typer.Option(
            help="Of --method quadratic and a chain of layers: write what proves the bound, for "
            "'lipfast verify'.",
            metavar="FILE",
        ),
    ] = None,
    floor: Annotated[
        bool,
        typer.Option(
            "--floor", help="Also search for what such upper bounds cannot be below, see above."
        ),
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also print how the upper bound is composed.")
    ] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Bound one checkpoint and print its layers.

    Without --data there is no lower bound.

    --floor says how far better upper bounds could come down: none that knows only between which
    slopes activations lie, not which of them inputs can reach, can be below the floor. It is no
    bound of the Lipschitz constant.

    \b
    Examples:
      lipfast bounds run/last.safetensors --arch models:mlp --data mnist1d:train
      lipfast bounds run/last.pt --arch models:cnn --arch-arg width=16 --input-shape 3,32,32 --json
      lipfast bounds run/last.ckpt --arch models:mlp --data mnist1d:train --prefix ema
      lipfast bounds last.pt --arch models:mlp --method quadratic --certificate last.json
      lipfast bounds last.pt --arch models:mlp --method quadratic --floor

    \b
    Exit codes:
      0    done
      2    wrong usage or input
      130  interrupted
    """  # noqa: D301 (\b is typer's mark)
    from lipfast.scoring import show  # noqa: PLC0415 (start-up time: torch)
    from lipfast.scoring.architectures import parse_arguments  # noqa: PLC0415 (start-up time: torch)
    from lipfast.scoring.single import bound_checkpoint  # noqa: PLC0415 (start-up time: torch)

    with options.computing(threads):
        read, found = bound_checkpoint(
            checkpoint,
            arch=arch,
            data=data,
            arch_args=parse_arguments(arch_arg or []),
            input_shape=None if input_shape is None else options.parse_shape(input_shape),
            prefix=prefix,
            norm=options.parse_norm(norm),
            seed=seed,
            device=device,
            method=cast("Any", method),
            effort=effort,
            certificate=certificate,
            floor=floor,
        )
    note = f"\n{read.note}" if read.note else ""
    text = f"{read.file.uri}{note}\n\n{found}" + (f"\n\n{found.explain()}" if explain else "")
    answer(as_json, show.bounds_json(read, found), text)
