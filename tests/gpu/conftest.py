"""Tests that need a CUDA device say so one by one, by name, where there is none.

All of them run on the stub of a device too (tests/support/cuda_stub.py), but for those marked
`hardware`: streams, graphs, and what a stub would take minutes for.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipfast import _native
from tests.support import cuda_stub


def missing() -> str | None:
    """Why nothing here can run, or None."""
    if "cuda" not in _native.devices():
        return f"no CUDA kernels: {_native.cuda_reason()}"
    return _native.no_cuda_device()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = missing()
    for item in items:
        if Path(__file__).parent in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            wrong = reason or wrong_device(item)
            if wrong is not None:
                item.add_marker(pytest.mark.skip(reason=f"{item.name}: {wrong}"))


def wrong_device(item: pytest.Item) -> str | None:
    """Why a test cannot run on this device, or None."""
    if cuda_stub.loaded() and item.get_closest_marker("hardware"):
        return "needs a real device"
    if not cuda_stub.loaded() and item.get_closest_marker("stub"):
        return "needs the stub of a device"
    return None


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def cases() -> int:
    """How many cases a test of many takes: a stub runs threads one after another."""
    return 4 if cuda_stub.loaded() else 300
