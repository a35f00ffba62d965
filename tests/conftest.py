"""Fixtures that every folder uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from lipfast import _native

# Deterministic, and without a time limit per example: timing never decides a test.
settings.register_profile(
    "lipfast",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("lipfast")

# A test that starts a subprocess must not inherit a forced capability from the caller's shell by
# accident.
os.environ.setdefault("LIPFAST_CPU_CAPABILITY", "")

# Processes that run tests at the same time share the cores: threads that wait for each other spin.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))


@pytest.fixture(params=_native.available_capabilities())
def capability(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine runs, in turn."""
    with _native.forced_capability(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def global_state_is_left_alone() -> Iterator[None]:
    """Threads, grad mode and the default dtype are as before, whatever a test calls."""
    before = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == before


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(0)
