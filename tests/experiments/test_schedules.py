from __future__ import annotations

from collections.abc import Callable

import pytest

from experiments.config import SweepConfig

MakeConfig = Callable[..., SweepConfig]


def test_learning_rates(make_config: MakeConfig) -> None:
    constant = make_config(lr=0.5)
    assert {constant.learning_rate(step) for step in range(6)} == {0.5}
    cosine = make_config(lr=0.5, schedule="cosine", warmup_steps=2)
    rates = [cosine.learning_rate(step) for step in range(6)]
    assert rates[:3] == [0.25, 0.5, 0.5]
    assert rates[4] == pytest.approx(0.25)
    assert rates == [*rates[:2], *sorted(rates[2:], reverse=True)]
    assert rates[-1] > 0
