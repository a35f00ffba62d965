"""One network of any architecture, with the interface of a group of one.

Convolutional networks are trained one at a time on one thread each: on the CPU, convolutions with
one group per network are slower than one network after another (1.3 to 1.5 times at widths of 5 to
20, batches of 128 images of 14 x 14), since the layers are large enough to fill a core.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.config import SweepConfig
from experiments.models import MODELS
from experiments.models.dropout import SeededDropout
from experiments.train.functional import ConnectedModel
from experiments.train.networks import Network
from experiments.train.stacked import DROPOUT_SEED

_CHUNK = 512
# Building a model draws from the global generator, which threads share.
_building = threading.Lock()


def build_seeded(config: SweepConfig, network: Network) -> nn.Module:
    """Return `torch.manual_seed(seed); model(width, ...)`, leaving the global generator alone."""
    with _building, torch.random.fork_rng(devices=[]):
        torch.manual_seed(network.seed)
        return MODELS[config.model](network.width, **config.architecture())


class SingleNetwork:
    """One network: a group as `train_group` wants it, of N = 1.

    Attributes:
        networks: the one network.
        parameters: of the module.
        masks: none.
        chunk: samples to evaluate at once.
    """

    def __init__(self, config: SweepConfig, network: Network) -> None:
        self.networks: tuple[Network, ...] = (network,)
        self.chunk = _CHUNK
        self.masks: dict[str, Tensor] = {}
        self._module = build_seeded(config, network)
        self.parameters: dict[str, Tensor] = dict(self._module.named_parameters())
        self._generator = torch.Generator().manual_seed(DROPOUT_SEED + network.seed)
        for module in self._module.modules():
            if isinstance(module, SeededDropout):
                module.generator = self._generator

    def prepared(self, x: Tensor) -> Tensor:
        """Return the samples as they are."""
        return x

    def taken(self, prepared: Tensor, chosen: Tensor) -> Tensor:
        """Select samples by index (1, batch)."""
        return prepared[chosen[0]]

    def part(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Select a range of samples."""
        return prepared[first:last]

    def forward(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Evaluate: (batch, ...) to (1, classes, batch)."""
        self._module.train(training)
        output: Tensor = self._module(x)
        return output.t().unsqueeze(0)

    def model(self, index: int) -> nn.Module:
        """Return the module, connected with its parameters."""
        return ConnectedModel(self._module, {**self.parameters, **self.buffers()})

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Copy the module's state."""
        return {name: t.detach().clone() for name, t in self._module.state_dict().items()}

    def per_network(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm over all tensors: (1,)."""
        norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return whole.reshape(1)

    def generators(self) -> list[torch.Generator]:
        """Return the generator of dropout."""
        return [self._generator]

    def buffers(self) -> dict[str, Tensor]:
        """Return the module's buffers: the running statistics of BatchNorm."""
        return dict(self._module.named_buffers())
