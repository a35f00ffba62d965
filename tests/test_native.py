from __future__ import annotations

import subprocess
import sys

import pytest

from lipfast import _native
from lipfast.errors import ArgumentError


def test_the_default_capability_always_runs() -> None:
    assert _native.available_capabilities()[0] == "default"
    assert _native.capability() in _native.available_capabilities()


def test_a_forced_capability_is_given_back() -> None:
    before = _native.capability()
    with _native.forced_capability("default"):
        assert _native.capability() == "default"
    assert _native.capability() == before
    with (
        pytest.raises(ArgumentError, match=r"'neon'.*choose one of: default"),
        _native.forced_capability("neon"),
    ):
        pass


def capability_with(environment: str) -> subprocess.CompletedProcess[str]:
    script = "import lipfast; print(lipfast.info()['capability'])"
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"LIPFAST_CPU_CAPABILITY": environment, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses() -> None:
    assert capability_with("default").stdout == "default\n"
    refused = capability_with("sse9")
    assert refused.returncode != 0
    assert "LIPFAST_CPU_CAPABILITY" in refused.stderr and "choose one of" in refused.stderr
