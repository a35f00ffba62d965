from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from experiments.config import SweepConfig
from experiments.train import Network, group_networks

MakeConfig = Callable[..., SweepConfig]


def test_groups_cover_the_sweep_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(widths=[1, 2, 4, 8, 500, 4000], seeds=[0, 1, 2], train_size=4000)
    every = [Network(width, seed) for width in config.widths for seed in config.seeds]
    groups = group_networks(config)
    assert sorted(
        (network for group in groups for network in group), key=lambda n: (n.width, n.seed)
    ) == sorted(every, key=lambda n: (n.width, n.seed))
    assert 1 < len(groups) < len(config.widths)
    monkeypatch.setattr("experiments.train.groups._ACTIVATION_LIMIT", 4000 * 5000)
    limited = group_networks(config)
    assert all(len(group) * max(n.width for n in group) <= 5000 for group in limited)
    assert math.prod(len(group) for group in limited[-3:]) == 1
