"""Options that commands share, and what is read from their texts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from lipfast.errors import ArgumentError

ArchOption = Annotated[
    str,
    typer.Option(
        help="module:function (the current folder is importable), or a model.pt2 file. Keyword "
        "arguments are taken from each checkpoint's metadata.",
        metavar="ARCH",
    ),
]
ArchArgsOption = Annotated[
    list[str] | None,
    typer.Option("--arch-arg", help="Keyword argument of the architecture.", metavar="KEY=VALUE"),
]
NormOption = Annotated[
    str, typer.Option(help="Norm of inputs and outputs: 1, 2 or inf.", metavar="NORM")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the start vectors.", metavar="N", min=0)]
PrefixOption = Annotated[
    str | None,
    typer.Option(
        help="Which of several networks in a file: what its names begin with, such as ema.",
        metavar="NAME",
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(help="CPU threads; by default as torch has it.", min=1, metavar="N"),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, cuda, cuda:1, or auto (cuda where it can be used, else cpu).",
        metavar="DEVICE",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


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


@contextmanager
def computing(threads: int | None) -> Iterator[None]:
    """Compute with so many threads inside the block; None leaves them as they are.

    Raises:
        ArgumentError: the threads are far more than the processor's cores.
    """
    import torch  # noqa: PLC0415 (start-up time: torch)

    most = 4 * (os.cpu_count() or 1)
    if threads is not None and threads > most:  # far more end in a crash of the thread library
        raise ArgumentError(f"--threads {threads}: expected at most {most} on this machine")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
