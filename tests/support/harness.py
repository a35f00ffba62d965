"""Builds the program that runs CUDA kernel bodies on a CPU, and runs cases with it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
HERE = ROOT / "tests" / "csrc"
KERNELS = ROOT / "csrc" / "kernels"
# races: the compiler reports every access of the kernels, and race_check.cpp takes the place of the
# thread sanitizer's library. Not position independent: addr2line reads the addresses in a message.
FLAGS = {
    "plain": ["-O1"],
    "races": ["-O1", "-g1", "-fsanitize=thread", "-fno-threadsafe-statics", "-DLIPFAST_RACE_CHECK"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
COMMON = [
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Wconversion",
    "-Wno-sign-conversion",
    "-Wno-float-conversion",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
]
# Memory that the kernels leave behind is the process's end; copies of fibers confuse the search.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")


def compiles(build: str) -> bool:
    """Whether the compiler can make a build; not every one has the sanitizers."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        only = ["-c"] if build == "races" else []
        command = [compiler() or "c++", *FLAGS[build], *only, str(source), "-o", f"{source}.out"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def build_program(build: str, kernels: Path, program: Path) -> None:
    """Compile the program with the kernel bodies of a folder: csrc/kernels or a copy of it."""
    compile_with = [compiler() or "c++", *COMMON, f"-I{kernels / 'cuda'}", f"-I{HERE}"]
    harness, checker = f"{program}-harness.o", f"{program}-checker.o"
    steps = [[*compile_with, *FLAGS[build], "-c", str(HERE / "harness.cpp"), "-o", harness]]
    if build == "races":
        source = str(HERE / "race_check.cpp")
        steps.append([*compile_with, "-O2", "-DLIPFAST_RACE_CHECK", "-c", source, "-o", checker])
        steps.append([compile_with[0], "-no-pie", harness, checker, "-o", str(program)])
    else:
        steps.append([compile_with[0], *FLAGS[build], harness, "-o", str(program)])
    for step in steps:
        ended = subprocess.run(step, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    for left in (harness, checker):
        Path(left).unlink(missing_ok=True)


def build_programs(folder: Path, kernels: Path) -> dict[str, Path]:
    """Every build that the compiler can make, all at the same time; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {build: folder / build for build in FLAGS if build == "plain" or compiles(build)}

    def make(build: str) -> None:
        if not paths[build].exists():
            part = folder / f"{build}.{os.getpid()}"
            build_program(build, kernels, part)
            part.rename(paths[build])

    with ThreadPoolExecutor() as pool:
        list(pool.map(make, paths))
    return paths


def fingerprint() -> str:
    """Of everything that the program is compiled from."""
    digest = hashlib.sha256(repr((FLAGS, COMMON, compiler())).encode())
    for path in sorted(
        [*KERNELS.rglob("*"), *HERE.glob("*.cpp"), *HERE.glob("*.h"), HERE / "mutations.py"]
    ):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    status: int
    message: str
    output: bytes

    def take(self, *parts: tuple[type[np.generic], int]) -> list[np.ndarray]:
        """The output as arrays, one after another; the run must have succeeded."""
        assert self.status == 0, self.message
        arrays, at = [], 0
        for dtype, count in parts:
            arrays.append(np.frombuffer(self.output, dtype, count, at).copy())
            at += arrays[-1].nbytes
        assert at == len(self.output)
        return arrays


@dataclass(frozen=True)
class Harness:
    """One build of the program. `mutant`: which of the changes of mutations.py is in force."""

    program: Path
    mutant: int = 0

    def run(self, kernel: str, inputs: Sequence[np.ndarray | Sequence[int]]) -> Result:
        """Run a kernel on arrays; sequences of integers become int64."""
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "input", Path(folder) / "output"
            with source.open("wb") as file:
                for entry in inputs:
                    array = np.asarray(
                        entry, dtype=None if isinstance(entry, np.ndarray) else "<i8"
                    )
                    file.write(np.ascontiguousarray(array).tobytes())
            ended = subprocess.run(
                [str(self.program), kernel, str(source), str(target)],
                env={**os.environ, **ENVIRONMENT, "LIPFAST_MUTANT": str(self.mutant)},
                capture_output=True,
                text=True,
                check=False,
            )
            output = target.read_bytes() if target.exists() else b""
        return Result(ended.returncode, ended.stderr, output)
