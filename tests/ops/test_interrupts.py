"""Signals during long native ops, and the share that they say is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.ops.chain_quadratic import ChainQuadratic, chain_quadratic
from lipfast.ops.interrupts import watched
from tests.support.writers import process_state

WIDTHS = {"one on all threads": (1, 600), "many on a thread each": (6, 200)}


def search(networks: int, width: int, evaluations: int) -> ChainQuadratic:
    """A call of several seconds for hundreds of evaluations."""
    generator = torch.Generator().manual_seed(0)
    weights: list[list[Tensor]] = [
        [torch.randn(width, width, generator=generator) / width**0.5 for _ in range(4)]
        for _ in range(networks)
    ]
    half, zero = (torch.full((width,), value, dtype=torch.float64) for value in (0.5, 0.0))
    return chain_quadratic(weights, [half] * 3, [zero] * 3, evaluations=evaluations)


def interrupted_at(share: list[float]) -> Callable[[float], None]:
    def watch(done: float) -> None:
        share.append(done)
        if len(share) == 2:
            signal.raise_signal(signal.SIGINT)

    return watch


@pytest.mark.parametrize("case", WIDTHS)
def test_an_interrupt_ends_the_search(case: str) -> None:
    before, shares = process_state(), list[float]()
    with pytest.raises(KeyboardInterrupt), watched(interrupted_at(shares)):
        search(*WIDTHS[case], 10_000)
    assert len(shares) == 2
    assert 0 <= shares[0] <= shares[1] < 0.5
    assert process_state() == before
    assert torch.isfinite(search(1, 20, 3).values).all()


def test_a_handler_that_raises_nothing_changes_nothing() -> None:
    calls, shares = [], list[float]()
    expected = search(6, 200, 40)
    handler = signal.signal(signal.SIGINT, lambda *_: calls.append(True))
    try:
        with watched(interrupted_at(shares)):
            found = search(6, 200, 40)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(calls) == (len(shares) > 1)
    assert torch.equal(found.values, expected.values)
    assert max(shares, default=0.0) <= 1.0


def test_what_a_handler_raises_is_raised() -> None:
    def fail(*_: object) -> None:
        raise ValueError("of the handler")

    handler = signal.signal(signal.SIGINT, fail)
    try:
        with pytest.raises(ValueError, match="of the handler"), watched(interrupted_at([])):
            search(1, 600, 10_000)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_other_threads_have_no_signals() -> None:
    found: list[ChainQuadratic] = []
    thread = threading.Thread(target=lambda: found.append(search(1, 200, 30)))
    thread.start()
    thread.join()
    assert torch.equal(found[0].values, search(1, 200, 30).values)


def test_a_plan_whose_bounds_were_interrupted_goes_on() -> None:
    layers = [torch.nn.Linear(300, 300) for _ in range(4)]
    model = torch.nn.Sequential(*[m for layer in layers for m in (layer, torch.nn.ReLU())][:-1])
    plan, state = lipfast.compile(model, torch.zeros(1, 300)), model.state_dict()
    tracker = plan.tracker(method="quadratic", effort=3)
    with pytest.raises(KeyboardInterrupt), watched(interrupted_at([])):
        tracker.upper([state] * 20)
    assert tracker.multipliers is None
    assert plan.upper(state, method="quadratic", effort=1).method == "quadratic constraints"
