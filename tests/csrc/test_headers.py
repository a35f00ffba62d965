"""Includes in csrc: no circles, and every body stands alone under every instruction set."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.harness import KERNELS, ROOT, compiler

CSRC = ROOT / "csrc"
CPU = KERNELS / "cpu"
BODIES = sorted(CPU.glob("*-inl.h"))
FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
SHIM = ("cuda_on_cpu.h", "mma_on_cpu.h")  # of tests/csrc
# What of a body is not used in a file of its own is no fault, nor are vectors passed by value.
FLAGS += ["-Wno-unused-function", "-Wno-psabi", "-Wno-unknown-pragmas"]


def included(path: Path) -> set[Path]:
    """Files of csrc that a file includes, as a body too."""
    names = re.findall(r'^#(?:include|define LIPFAST_BODY) "(.+)"', path.read_text(), re.MULTILINE)
    found = {(path.parent / name).resolve() for name in names}
    strangers = [file for file in found if not file.is_file() and file.name not in SHIM]
    assert not strangers, f"{path}: includes {strangers}"
    return found


def guard(path: Path) -> str:
    return f"LIPFAST_{path.name.removesuffix('-inl.h').upper()}_INL_H"


def test_no_circle_of_includes() -> None:
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert len(sources) > len(BODIES) > 0
    TopologicalSorter({path.resolve(): included(path) for path in sources}).prepare()


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.name)
def test_a_body_has_its_guard(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("//")]
    assert lines[:2] == [f"#ifndef {guard(path)}", f"#define {guard(path)}"]
    assert lines[-1] == "#endif"


@pytest.mark.parametrize("path", BODIES, ids=lambda path: path.name)
def test_a_body_includes_bodies_only(path: Path) -> None:
    """It stands in a namespace already."""
    names = re.findall(r"^#include (.+)$", path.read_text(), re.MULTILINE)
    assert all(name.endswith('-inl.h"') for name in names), names


def test_every_instruction_set_forgets_the_guards() -> None:
    forgotten = re.findall(r"^#undef (\w+)$", (CPU / "isa_pass.h").read_text(), re.MULTILINE)
    expected = {"LIPFAST_ISA", "LIPFAST_VECTOR_BYTES", *map(guard, BODIES)}
    assert len(forgotten) == len(expected)
    assert set(forgotten) == expected


def alone(bodies: list[Path], folder: Path) -> str:
    """A source in which each body stands alone, twice, in a namespace of its own."""
    contracts = [path for path in CPU.glob("*.h") if path not in BODIES and "isa" not in path.name]
    lines = [f'#include "{path}"' for path in [CPU / "simd.h", *sorted(contracts)]]
    for path in bodies:
        twice = folder / path.name
        twice.write_text(f'#include "{path}"\n' * 2)
        lines += [
            f"#define LIPFAST_ISA alone_{guard(path).lower()}",
            "#define LIPFAST_VECTOR_BYTES 16",
            f'#define LIPFAST_BODY "{twice}"',
            f'#include "{CPU}/isa_pass.h"',
            "#undef LIPFAST_BODY",
        ]
    return "\n".join(lines) + "\n"


def test_every_body_includes_what_it_uses(tmp_path: Path) -> None:
    if compiler() is None:
        pytest.skip("no C++ compiler: bodies cannot be compiled alone")
    groups = [BODIES[start::4] for start in range(4)]

    def complaints(numbered: tuple[int, list[Path]]) -> str:
        source = tmp_path / f"group_{numbered[0]}.cpp"
        source.write_text(alone(numbered[1], tmp_path))
        command = [compiler() or "c++", *FLAGS, str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    with ThreadPoolExecutor() as pool:
        found = "".join(pool.map(complaints, enumerate(groups)))
    assert not found, found
