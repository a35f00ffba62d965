"""The program that runs CUDA kernel bodies on a CPU, as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.harness import KERNELS, ROOT, Harness, build_programs, compiler, fingerprint


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """All builds; kept in build/ until a source changes."""
    if compiler() is None:
        pytest.skip("no C++ compiler: kernel bodies cannot be compiled for the CPU")
    return build_programs(ROOT / "build" / "cuda_on_cpu" / fingerprint(), KERNELS)


@pytest.fixture(scope="session")
def plain(programs: dict[str, Path]) -> Harness:
    """The build without any checks but the shim's own."""
    return Harness(programs["plain"])


@pytest.fixture(scope="session")
def races(programs: dict[str, Path]) -> Harness:
    """The build that finds races."""
    if "races" not in programs:
        pytest.skip("the compiler has no -fsanitize=thread: races are not looked for")
    return Harness(programs["races"])


@pytest.fixture(scope="session")
def checked(programs: dict[str, Path]) -> Harness:
    """The build that finds races, where the compiler can make it."""
    return Harness(programs.get("races", programs["plain"]))


@pytest.fixture(scope="session")
def sanitized(programs: dict[str, Path]) -> Harness:
    """The build with address and undefined-behaviour sanitizers."""
    if "sanitized" not in programs:
        pytest.skip("the compiler has no sanitizers (libasan, libubsan)")
    return Harness(programs["sanitized"])
