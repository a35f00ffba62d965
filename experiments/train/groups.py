"""Which networks of a sweep are trained together."""

from __future__ import annotations

import math

from experiments.config import SweepConfig
from experiments.train.networks import Network

# Elements of one hidden layer's activations in a group (float32: 256 MiB).
_ACTIVATION_LIMIT = 1 << 26
# A step of a group costs about 0.15 ms however small the networks are: as much as this many
# activations. Measured on two cores.
_GROUP_OVERHEAD = 50_000


def group_networks(config: SweepConfig) -> list[tuple[Network, ...]]:
    """Split a sweep into groups to be trained together, at the least estimated cost.

    Fully connected networks are stacked. Padding wastes arithmetic, groups cost a fixed time per
    step: dynamic programming over the sorted widths finds the cheapest split. All seeds of a width
    share a group unless that needs too much memory. Other networks are groups of one. The split
    depends on the configuration only, so that a sweep that is resumed repeats the same arithmetic.

    Args:
        config: the sweep.

    Returns:
        Groups of networks, in ascending order of width.
    """
    if config.model != "fcn":
        return [(Network(width, seed),) for width in config.widths for seed in config.seeds]
    batch = config.batch_size
    limit = max(1, _ACTIVATION_LIMIT // config.train_size)

    def cost(start: int, stop: int) -> float:
        units = (stop - start) * len(config.seeds) * config.widths[stop - 1]
        if units > limit and stop - start > 1:
            return math.inf
        return _GROUP_OVERHEAD + units * batch

    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(config.widths) + 1):
        best.append(min((best[start][0] + cost(start, stop), start) for start in range(stop)))
    groups: list[tuple[Network, ...]] = []
    stop = len(config.widths)
    while stop:
        start = best[stop][1]
        seeds_at_once = max(1, limit // (config.widths[stop - 1] * (stop - start)))
        for first in reversed(range(0, len(config.seeds), seeds_at_once)):
            seeds = config.seeds[first : first + seeds_at_once]
            widths = config.widths[start:stop]
            groups.append(tuple(Network(width, seed) for width in widths for seed in seeds))
        stop = start
    return groups[::-1]
