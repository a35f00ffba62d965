"""The clock of the native ops."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest
import torch

import lipfast
from lipfast._clock import clocked, running


def test_counts_the_ops_of_both_bounds():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = lipfast.compile(model, torch.zeros(2, 4))
    seconds: Counter[str] = Counter()
    started = time.perf_counter()
    with clocked(seconds):
        plan.bounds(model.state_dict(), torch.ones(3, 4))
    whole = time.perf_counter() - started
    assert set(seconds) == {"spectral_norms", "chain_jacobian_norms"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) < whole


def test_norms_without_a_native_op_are_not_counted():
    model = torch.nn.Linear(4, 2)
    seconds: Counter[str] = Counter()
    with clocked(seconds):
        lipfast.compile(model, torch.zeros(2, 4)).bounds(
            model.state_dict(), torch.ones(3, 4), norm=1
        )
    assert not seconds


def test_nothing_is_counted_outside_and_in_other_threads():
    seconds: Counter[str] = Counter()

    def elsewhere() -> None:
        lipfast.spectral_norms([torch.eye(2)])

    with clocked(seconds):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    lipfast.spectral_norms([torch.eye(2)])
    assert not seconds


def test_the_inner_block_counts_and_errors_end_it():
    outer: Counter[str] = Counter()
    inner: Counter[str] = Counter()
    with clocked(outer):
        with pytest.raises(ValueError, match="broken"), clocked(inner), running("op"):
            raise ValueError("broken")
        with running("other"):
            pass
    assert (set(inner), set(outer)) == ({"op"}, {"other"})
