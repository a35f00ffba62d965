"""The interpolation threshold: from which width on networks can fit the training set."""

from __future__ import annotations

import itertools

from experiments.analysis.widths import WidthSummary
from experiments.config import SweepConfig
from experiments.data import CLASSES, INPUTS


def parameter_count(config: SweepConfig, width: int) -> int:
    """Count the parameters of a network of the sweep."""
    sizes = [INPUTS, *[width] * config.depth, CLASSES]
    weights = sum(before * after for before, after in itertools.pairwise(sizes))
    return weights + (sum(sizes[1:]) if config.bias else 0)


def interpolation_threshold(summary: WidthSummary, config: SweepConfig) -> int | None:
    """Return the width from which on networks can fit the training set.

    Cross-entropy: the smallest width of the sweep at which the training error is 0 for every
    seed, None if there is none. Squared error: the smallest width whose parameters are at least as
    many as there are numbers to fit, samples times classes; it may lie between two widths.

    Args:
        summary: of the sweep.
        config: of the sweep.
    """
    if config.loss == "mse":
        width = 1
        while parameter_count(config, width) < config.train_size * CLASSES:
            width += 1
        return width
    fitting = summary.widths[summary.mean["train_error"] == 0]
    return int(fitting[0]) if len(fitting) else None
