"""How much of a kernel's machine code is arithmetic: the fused operations of its hot loop.

`cuobjdump` comes with the CUDA toolkit (package cuda-cuobjdump), and as PyPI's
nvidia-cuda-cuobjdump; the variable CUOBJDUMP names one that is not on the path.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

# Fused operations on a warp's 32 lanes, and those of tensor cores.
FUSED = re.compile(r"(?:FFMA|FFMA2|DFMA|HMMA|DMMA)\b")
TENSOR = re.compile(r"(?:HMMA|DMMA)\b")
TENSOR_WORK = 32  # fused operations of a lane in one of TF32: 16 x 8 x 8 for 32 lanes
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*?);")
_FUNCTION = re.compile(r"Function : (?:void )?lipfast::cuda::(\w+(?:<[^>]*>)?)\(")


Span: TypeAlias = tuple[int, int]  # addresses of the first and the last instruction


@dataclass(frozen=True)
class Loop:
    """Instructions of the loop in which arithmetic is densest, and how many are fused operations.

    The densest has the largest product of their work and its share of the instructions, where those
    of tensor cores count as many as the work that they do. Loops within it are counted apart. A
    kernel without a loop counts as one.
    """

    instructions: int
    fused: int
    tensor: int = 0  # of the fused operations, those of tensor cores

    @property
    def density(self) -> float:
        """Of arithmetic."""
        work = self.fused + (TENSOR_WORK - 1) * self.tensor
        return work**2 / max(1, self.instructions)

    @property
    def share(self) -> int:
        """Percent."""
        return round(100 * self.fused / max(1, self.instructions))


def find_cuobjdump(nvcc: Path) -> str:
    """The program; exits where there is none."""
    found = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    for folder in (nvcc.parent, *_package_folders()):
        if found is None and (folder / "cuobjdump").is_file():
            found = str(folder / "cuobjdump")
    if found is None or shutil.which(found) is None:
        sys.exit(
            "no cuobjdump, which lists machine code: install the toolkit's cuda-cuobjdump and "
            "cuda-nvdisasm, or nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm with pip"
        )
    return found


def _package_folders() -> list[Path]:
    """Where PyPI's packages of the toolkit have their programs in this environment."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return [folder for place in places for folder in sorted(Path(place).glob("cu*/bin"))]


def listing(cuobjdump: str, compiled: Path) -> str:
    """The machine code of an object file, names readable."""
    shown = subprocess.run(
        [cuobjdump, "-sass", str(compiled)], capture_output=True, text=True, check=False
    )
    if shown.returncode != 0:
        sys.exit(f"{cuobjdump} failed on {compiled.name}:\n{shown.stdout}{shown.stderr}")
    return subprocess.run(
        ["c++filt"], input=shown.stdout, capture_output=True, text=True, check=True
    ).stdout


def hot_loops(text: str) -> dict[tuple[str, str], Loop]:
    """By kernel and architecture, from a listing."""
    found: dict[tuple[str, str], Loop] = {}
    for part in re.split(r"^\s*code for (?=sm_)", text, flags=re.MULTILINE)[1:]:
        architecture = part.split(maxsplit=1)[0]
        pieces = _FUNCTION.split(part)
        for kernel, body in zip(pieces[1::2], pieces[2::2], strict=True):
            found[kernel, architecture] = hot_loop(body)
    return found


def hot_loop(body: str) -> Loop:
    """Of one function's listing."""
    code = [(int(at, 16), name, rest) for at, name, rest in _instructions(body)]
    loops = [(target, at) for target, at in _branches(code) if target <= at]
    counts = [_count(code, loop, loops) for loop in loops or [(0, code[-1][0])]]
    return max(counts, key=lambda loop: loop.density)


def _instructions(body: str) -> Iterator[tuple[str, str, str]]:
    for line in body.splitlines():
        match = _LINE.match(line)
        if match is not None:
            yield match[1], match[2], match[3]


def _branches(code: list[tuple[int, str, str]]) -> Iterator[Span]:
    """Targets and places. The last instruction of a listing branches to itself: no loop."""
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.split(".")[0] == "BRA" and target is not None and int(target[1], 16) != at:
            yield int(target[1], 16), at


def _count(code: list[tuple[int, str, str]], loop: Span, loops: list[Span]) -> Loop:
    """Of a loop without the loops in it."""
    inner = [(a, b) for a, b in loops if loop[0] <= a and b <= loop[1] and (a, b) != loop]
    names = [
        name
        for at, name, _ in code
        if loop[0] <= at <= loop[1] and not any(a <= at <= b for a, b in inner)
    ]
    fused, tensor = [
        sum(kind.match(name) is not None for name in names) for kind in (FUSED, TENSOR)
    ]
    return Loop(len(names), fused, tensor)
