"""Losses, errors and gradient norms of a group over whole data sets."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.losses import network_losses
from experiments.train.networks import Group, Metrics


class Measure:
    """Evaluates a group on the training and the test set, in eval mode.

    Args:
        config: the sweep.
        group: the networks.
        data: training and test set.
    """

    def __init__(self, config: SweepConfig, group: Group, data: ClassificationData) -> None:
        self._config, self._group = config, group
        self._sets = [
            (group.prepared(x), y)
            for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
        ]

    def _losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        config = self._config
        return network_losses(config.loss, outputs, labels, config.target_scale)

    def _losses_and_errors(self, which: int) -> tuple[Tensor, Tensor]:
        x, y = self._sets[which]
        count, step = len(y), self._group.chunk
        losses = torch.zeros(len(self._group.networks), dtype=torch.float64)
        wrong = torch.zeros_like(losses)
        with torch.no_grad():
            for first in range(0, count, step):
                labels = y[first : first + step]
                outputs = self._group.forward(self._group.part(x, first, first + step))
                share = len(labels) / count
                losses += share * self._losses(outputs, labels)
                wrong += (outputs.argmax(dim=1) != labels).double().sum(dim=1)
        return losses, wrong / count

    def metrics(self) -> list[Metrics]:
        """Return the metrics of every network."""
        (train, train_wrong), (test, test_wrong) = map(self._losses_and_errors, (0, 1))
        columns = (train, test, train_wrong, test_wrong)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Metrics(*row) for row in rows]

    def train_losses(self) -> list[float]:
        """Return the training loss of every network."""
        return self._losses_and_errors(0)[0].tolist()

    def gradient_norms(self) -> list[float]:
        """Return the norm of the gradient of the training loss, of every network."""
        x, y = self._sets[0]
        group, count = self._group, len(y)
        parameters = list(group.parameters.values())
        total: list[Tensor] = []
        for first in range(0, count, group.chunk):
            labels = y[first : first + group.chunk]
            with torch.enable_grad():
                outputs = group.forward(group.part(x, first, first + group.chunk))
                loss = self._losses(outputs, labels).sum() * (len(labels) / count)
                gradients = torch.autograd.grad(loss, parameters)
            total = (
                [a + b for a, b in zip(total, gradients, strict=True)] if total else [*gradients]
            )
        for index, name in enumerate(group.parameters):
            if name in group.masks:
                total[index] = total[index] * group.masks[name]
        return group.per_network(total).tolist()
