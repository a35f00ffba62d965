from __future__ import annotations

import pytest

from experiments.spacing import log_spaced_steps


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 2000, 10**6])
@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_log_spaced_steps(steps: int, count: int) -> None:
    chosen = log_spaced_steps(steps, count)
    assert chosen[0] == 0
    assert chosen[-1] == steps
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(count, steps + 1)
