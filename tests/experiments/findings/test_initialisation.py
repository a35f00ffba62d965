"""The published bounds at initialisation: Khromov and Singh (2024), FCN 256 on MNIST1D."""

from __future__ import annotations

import torch

import lipfast
from experiments.data import mnist1d
from experiments.models import fcn
from experiments.study import load_study
from experiments.train import Network
from experiments.train.stacked import initial_state


def test_bounds_at_initialisation_are_the_published_ones() -> None:
    (config,) = load_study("C5-initialisation", "paper").sweeps
    assert (config.bias, config.output_activation, config.depth) == (False, "relu", 1)
    assert len(config.seeds) >= 4
    x = mnist1d().x_train
    lower, mean = [], []
    for seed in config.seeds:
        model = fcn(256, **config.architecture())
        model.load_state_dict(initial_state(config, Network(256, seed)))
        norms = lipfast.jacobian_norms(model, x)
        lower.append(norms.max())
        mean.append(norms.mean())
    assert 0.38 <= torch.stack(lower).mean() <= 0.43
    assert 0.28 <= torch.stack(mean).mean() <= 0.32
