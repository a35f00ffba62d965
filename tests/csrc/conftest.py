"""The program that runs CUDA kernel bodies on a CPU, as fixtures."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import (
    FLAGS,
    KERNELS,
    ROOT,
    Harness,
    compiler,
    fingerprint,
    finish_build,
    sanitizers_work,
    start_build,
)


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    """Both builds, compiled at the same time; kept in build/ until a source changes."""
    if compiler() is None:
        pytest.skip("no C++ compiler: kernel bodies cannot be compiled for the CPU")
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [build for build in FLAGS if build == "plain" or sanitizers_work()]
    built = {build: folder / f"{build}-{fingerprint()}" for build in wanted}
    running = []
    for build, path in built.items():
        if not path.exists():
            part = path.with_suffix(".part")
            running.append((start_build(build, KERNELS, part), part, path))
    for process, part, path in running:
        finish_build(process)
        part.rename(path)
    return built


@pytest.fixture(scope="session")
def plain(programs: dict[str, Path]) -> Harness:
    """The fast build."""
    return Harness(programs["plain"])


@pytest.fixture(scope="session")
def sanitized(programs: dict[str, Path]) -> Harness:
    """The build with address and undefined-behaviour sanitizers."""
    if "sanitized" not in programs:
        pytest.skip("the compiler has no sanitizers (libasan, libubsan)")
    return Harness(programs["sanitized"])
