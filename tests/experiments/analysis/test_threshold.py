from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest

from experiments.analysis import interpolation_threshold, parameter_count, summarise
from experiments.config import SweepConfig
from experiments.models import fcn

MakeConfig = Callable[..., SweepConfig]


def test_threshold_for_cross_entropy_is_zero_training_error(
    scores: pa.Table, make_config: MakeConfig
) -> None:
    summary = summarise(scores)
    assert interpolation_threshold(summary, make_config()) == 32
    summary.mean["train_error"][:] = 0.1  # type: ignore[index]
    assert interpolation_threshold(summary, make_config()) is None


@pytest.mark.parametrize(("depth", "bias"), [(1, False), (1, True), (3, True)])
def test_threshold_for_squared_error_counts_parameters(
    scores: pa.Table, make_config: MakeConfig, depth: int, bias: bool
) -> None:
    config = make_config(loss="mse", train_size=4000, depth=depth, bias=bias)
    threshold = interpolation_threshold(summarise(scores), config)
    assert threshold is not None
    assert parameter_count(config, threshold - 1) < 40_000 <= parameter_count(config, threshold)
    model = fcn(threshold, depth=depth, bias=bias)
    assert parameter_count(config, threshold) == sum(p.numel() for p in model.parameters())
    assert (depth, bias) != (1, False) or threshold == 800
