"""Tests that need a CUDA device say so one by one, by name, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lipfast import _native


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
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"{item.name}: {reason}"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda")
