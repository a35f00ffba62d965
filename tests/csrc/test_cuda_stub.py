"""tests/gpu runs whole on the stub of a device: ops, launchers and kernels, without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support.harness import ROOT, compiler


def test_the_tests_of_the_device_pass_on_the_stub() -> None:
    if compiler() is None or sys.platform != "linux":
        pytest.skip("no C++ compiler, or not Linux: the stub cannot be built")
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.cuda_stub", "tests/gpu"]
    ended = subprocess.run(
        [*command, "-q", "--tb=short", "--show-capture=no", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 0, shown
    passed = re.search(r"(\d+) passed", shown)
    assert passed is not None and int(passed[1]) >= 40, shown
    # Whatever else is skipped needs a real device: it says so.
    skipped = [line for line in shown.splitlines() if line.startswith("SKIPPED")]
    assert skipped and all("needs a real device" in line for line in skipped), shown
