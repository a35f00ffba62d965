"""Builds the program that runs CUDA kernel bodies on a CPU, and runs cases with it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "kernels"
FLAGS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
COMMON = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
# Memory that the kernels leave behind is the process's end; copies of fibers confuse the search.
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) or shutil.which("g++")


def sanitizers_work() -> bool:
    """Whether the compiler has the sanitizers' libraries."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [compiler() or "c++", *FLAGS["sanitized"], str(source), "-o", f"{source}.out"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def start_build(build: str, kernels: Path, program: Path) -> subprocess.Popen[str]:
    """Start compiling the program with the kernel bodies of a folder (csrc/kernels or a copy)."""
    source = (HERE / "harness.cpp").read_text()
    local = program.with_suffix(".cpp")
    local.write_text(source)
    return subprocess.Popen(
        [
            *[compiler() or "c++", *COMMON, *FLAGS[build]],
            *[f"-I{kernels / 'cuda'}", f"-I{HERE}", str(local), "-o", str(program)],
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish_build(process: subprocess.Popen[str]) -> None:
    """Wait for the compiler; its messages are the error."""
    output, _ = process.communicate()
    assert process.returncode == 0, output


def fingerprint() -> str:
    """Of everything that the program is compiled from."""
    digest = hashlib.sha256(repr((FLAGS, COMMON, compiler())).encode())
    for path in sorted([*KERNELS.rglob("*"), *HERE.glob("*.cpp"), *HERE.glob("*.h")]):
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
    """One build of the program."""

    program: Path

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
                env={**os.environ, **ENVIRONMENT},
                capture_output=True,
                text=True,
                check=False,
            )
            output = target.read_bytes() if target.exists() else b""
        return Result(ended.returncode, ended.stderr, output)
