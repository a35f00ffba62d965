"""The mini-batches of a group of networks."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.train.networks import Group

# Separates the order of the mini-batches from the initial weights of the same seed.
_ORDER_SEED = 0x5EED_0000_0000


class Batches:
    """The mini-batches of a group; each network has the order that its seed gives.

    Attributes:
        generators: of the orders, one per network.
        order: indices of the samples in the order of this epoch, (N, train_size).
    """

    def __init__(self, config: SweepConfig, group: Group, data: ClassificationData) -> None:
        self._config, self._group = config, group
        self._x, self._y = group.prepared(data.x_train), data.y_train
        self.generators = [
            torch.Generator().manual_seed(_ORDER_SEED + network.seed) for network in group.networks
        ]
        self.order = torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return samples and labels of update `step`; call it for 0, 1, 2, ..."""
        config = self._config
        if config.batch_size == config.train_size:
            return self._x, self._y
        within = step % config.steps_per_epoch
        if within == 0:
            orders = [torch.randperm(config.train_size, generator=g) for g in self.generators]
            self.order = torch.stack(orders)
        chosen = self.order[:, within * config.batch_size : (within + 1) * config.batch_size]
        return self._group.taken(self._x, chosen), self._y[chosen]
