"""Changes of the CUDA kernels' source, one at a time, that the tests must notice.

`plant` copies the kernels and puts every change behind a switch, so that one build holds them all.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutation:
    """One change. `kind`: barrier, copy, mask or distance (of a shuffle)."""

    number: int
    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.file}-{self.line}-{self.number}"


def plant(kernels: Path, target: Path) -> list[Mutation]:
    """Copy csrc/kernels to a folder and plant all changes in its CUDA bodies; the changes."""
    shutil.copytree(kernels, target)
    found: list[Mutation] = []
    for path in sorted((target / "cuda").glob("*.cuh")):
        if path.name == "launch.cuh":  # of the launchers: not compiled here
            continue
        lines = path.read_text().splitlines()
        for index, line in enumerate(lines):
            lines[index] = _plant_line(line, path.name, index + 1, found)
        path.write_text('#include "mutant.h"\n#line 1\n' + "\n".join(lines) + "\n")
    return found


def _plant_line(line: str, file: str, number: int, found: list[Mutation]) -> str:
    code = line.split("//", maxsplit=1)[0]
    definition = "__device__" in code or "inline" in code
    if definition and not code.rstrip().endswith(";"):
        return line

    def add(kind: str) -> int:
        found.append(Mutation(len(found) + 1, file, number, kind, line.strip()))
        return len(found)

    def each(pattern: str, kind: str, change: Callable[[re.Match[str], int], str]) -> None:
        nonlocal code
        code = re.sub(pattern, lambda match: change(match, add(kind)), code)

    if definition:  # of one line: only the operations in its body
        return line
    each(
        r"\b(?:__syncthreads|grid_barrier|__syncwarp)\(\);",
        "barrier",
        lambda match, n: f"if (!mutant({n})) {match[0]}",
    )
    each(
        r"= __syncthreads_count\((.*)\);",
        "barrier",
        lambda match, n: (
            f"= mutant({n}) ? static_cast<int>({match[1]}) : __syncthreads_count({match[1]});"
        ),
    )
    each(
        r"\bcopy_async_(?:commit|wait<\d>)\(\);",
        "copy",
        lambda match, n: f"if (!mutant({n})) {match[0]}",
    )
    each(
        r"(_sync\()kAllLanes",
        "mask",
        lambda match, n: f"{match[1]}(mutant({n}) ? 0x0000FFFFu : kAllLanes)",
    )
    each(r"lanes > 0;", "distance", lambda match, n: f"lanes > (mutant({n}) ? 1 : 0);")
    return code
