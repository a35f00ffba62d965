"""What is trained, and what training says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Network:
    """One network of a sweep.

    Attributes:
        width: units per hidden layer, or what `SweepConfig.widths` says.
        seed: of its initial weights, the order of its mini-batches and its dropout.
    """

    width: int
    seed: int


@dataclass(frozen=True)
class Metrics:
    """Losses and error rates (fractions of the samples) of one network at one step."""

    train_loss: float
    test_loss: float
    train_error: float
    test_error: float


@dataclass(frozen=True)
class LogRow:
    """One network at one logged step.

    Attributes:
        network: which network.
        step: number of updates made.
        lr: learning rate of the next update.
        metrics: at this step.
        gradient_norm: Euclidean norm of the gradient of the loss over all training samples.
        path_length: sum of the Euclidean lengths of all updates; NaN where they are not added up.
        distance: Euclidean distance of the parameters from their start.
        weight_norm: Euclidean norm of the parameters.
    """

    network: Network
    step: int
    lr: float
    metrics: Metrics
    gradient_norm: float
    path_length: float
    distance: float
    weight_norm: float


@dataclass(frozen=True)
class Snapshot:
    """One network at one of the steps at which checkpoints are written, or where it ends.

    Attributes:
        network: which network.
        step: number of updates made.
        state_dict: names and shapes of the model at the network's own width; None when it diverged.
        metrics: at this step.
        diverged: a weight or the training loss is NaN or infinite. Reported once; the network
            has no later snapshots.
        ended: why there are no later snapshots: "steps", "gradient_norm", "train_loss" or
            "diverged"; "" while there are.
    """

    network: Network
    step: int
    state_dict: dict[str, Tensor] | None
    metrics: Metrics
    diverged: bool
    ended: str = ""


class Group(Protocol):
    """Networks that are trained together.

    Attributes:
        networks: which networks, in the order of the first dimension of every tensor.
        parameters: name to leaf tensor, (N, ...) or, where N is 1, as the model has it.
        masks: name to a tensor that the gradient is multiplied by; empty where none is needed.
        chunk: samples to evaluate at once.
    """

    networks: tuple[Network, ...]
    parameters: dict[str, Tensor]
    masks: dict[str, Tensor]
    chunk: int

    def prepared(self, x: Tensor) -> Tensor:
        """Lay out samples (samples, ...) as `forward` wants them."""

    def taken(self, prepared: Tensor, chosen: Tensor) -> Tensor:
        """Select for each network samples of its own, by index (N, batch)."""

    def part(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Select a range of samples, for all networks."""

    def forward(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Evaluate all networks: (N, classes, batch)."""

    def model(self, index: int) -> torch.nn.Module:
        """Return one network as a module whose parameters are connected with `parameters`."""

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Copy one network's parameters and buffers, named and shaped as the model's."""

    def per_network(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm, per network (N,), of tensors that are shaped as the parameters."""

    def generators(self) -> list[torch.Generator]:
        """Return the generators that training draws from."""

    def buffers(self) -> dict[str, Tensor]:
        """Return tensors, beside the parameters, that training changes in place."""
