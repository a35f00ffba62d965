"""Fully connected networks of many widths and seeds in stacked parameters: one product per layer.

The networks of a group have one depth and differ in width and seed. All are padded with zero units
to the widest, so that layer `l` of all N networks is one tensor (N, n_l, n_{l-1}). Samples are
columns: the activations are (N, n_l, batch), which makes every product of a step a batched matrix
product without a transposed copy, and lets cross-entropy read them as they are. On two cores this
takes about half the time of `torch.func.vmap` over `functional_call`, and a small part of training
one network after another.

A padded unit stays exactly zero: its weights start at zero and their gradients are multiplied by a
0/1 mask, and every optimizer maps a zero weight with a zero gradient to zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.config import SweepConfig
from experiments.models import fcn
from experiments.models.dropout import SeededDropout
from experiments.train.functional import ConnectedModel
from experiments.train.networks import Network

# Separates the draws of dropout from the initial weights of the same seed.
DROPOUT_SEED = 0xD509_0000_0000


def _architecture(config: SweepConfig, width: int) -> nn.Sequential:
    with torch.device("meta"):
        return fcn(width, **config.architecture())


def initial_state(config: SweepConfig, network: Network) -> dict[str, Tensor]:
    """Return the state dict of `torch.manual_seed(seed); fcn(width, ...)`, bit for bit.

    PyTorch's default for `nn.Linear`: weights and biases uniform in +-1/sqrt(fan-in). Drawn from
    the network's own generator, so that it depends on nothing but its seed and architecture.

    Args:
        config: the sweep.
        network: the width and the seed.

    Returns:
        Parameter name to float32 tensor.
    """
    generator = torch.Generator().manual_seed(network.seed)
    state: dict[str, Tensor] = {}
    for name, module in _architecture(config, network.width).named_children():
        if not isinstance(module, nn.Linear):
            continue
        weight = torch.empty(module.out_features, module.in_features)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
        state[f"{name}.weight"] = weight
        if module.bias is not None:
            limit = 1 / math.sqrt(module.in_features)
            bias = torch.empty(module.out_features)
            state[f"{name}.bias"] = nn.init.uniform_(bias, -limit, limit, generator=generator)
    return state


class StackedNetworks:
    """N networks of one depth in stacked parameters, padded with zero units to one width.

    Attributes:
        networks: which networks, in the order of the first dimension of every tensor.
        parameters: name to leaf tensor; weights (N, n_out, n_in), biases (N, n_out, 1).
        masks: name to tensor of ones and zeros, broadcastable to the parameter; empty when
            nothing is padded.
        chunk: samples to evaluate at once.
    """

    def __init__(self, config: SweepConfig, networks: Sequence[Network]) -> None:
        self.networks = tuple(networks)
        self.chunk = config.train_size
        width = max(network.width for network in networks)
        self._config = config
        self._modules = list(_architecture(config, width).named_children())
        states = [initial_state(config, network) for network in networks]
        self._shapes = [{name: t.shape for name, t in state.items()} for state in states]
        self._dropout = [
            torch.Generator().manual_seed(DROPOUT_SEED + network.seed) for network in networks
        ]
        self.parameters: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        padded = any(network.width < width for network in networks)
        for name, parameter in _architecture(config, width).named_parameters():
            rows, columns = parameter.shape if parameter.dim() == 2 else (len(parameter), 1)
            stacked = torch.zeros(len(states), rows, columns)
            mask = torch.zeros_like(stacked)
            for index, state in enumerate(states):
                tensor = state[name] if state[name].dim() == 2 else state[name].unsqueeze(1)
                corner = (index, slice(tensor.shape[0]), slice(tensor.shape[1]))
                stacked[corner] = tensor
                mask[corner] = 1
            self.parameters[name] = stacked.requires_grad_()
            if padded:
                self.masks[name] = mask

    def prepared(self, x: Tensor) -> Tensor:
        """Return samples (samples, inputs) as columns."""
        return x.t().contiguous()

    def taken(self, prepared: Tensor, chosen: Tensor) -> Tensor:
        """Select columns for each network: (N, inputs, batch)."""
        return prepared[:, chosen].transpose(0, 1)

    def part(self, prepared: Tensor, first: int, last: int) -> Tensor:
        """Select a range of columns."""
        return prepared[:, first:last]

    def _dropped(self, hidden: Tensor, p: float) -> Tensor:
        # Each network draws as many numbers as it has units: the others' widths do not matter.
        keep = torch.zeros_like(hidden)
        for index, (network, generator) in enumerate(
            zip(self.networks, self._dropout, strict=True)
        ):
            keep[index, : network.width].bernoulli_(1 - p, generator=generator)
        return hidden * keep / (1 - p)

    def forward(self, x: Tensor, *, training: bool = False) -> Tensor:
        """Evaluate all networks.

        Args:
            x: (inputs, batch) for all networks alike, or (N, inputs, batch).
            training: whether units are dropped.

        Returns:
            (N, classes, batch).
        """
        hidden = x.expand(len(self.networks), *x.shape[-2:])
        for name, module in self._modules:
            if isinstance(module, nn.Linear):
                weight, bias = self.parameters[f"{name}.weight"], None
                if module.bias is not None:
                    bias = self.parameters[f"{name}.bias"]
                hidden = (
                    torch.bmm(weight, hidden)
                    if bias is None
                    else torch.baddbmm(bias, weight, hidden)
                )
            elif isinstance(module, nn.Softmax):
                hidden = hidden.softmax(dim=1)  # samples are columns here, rows in the module
            elif isinstance(module, SeededDropout):
                hidden = self._dropped(hidden, module.p) if training else hidden
            else:
                hidden = module(hidden)
        return hidden

    def _own(self, index: int) -> dict[str, Tensor]:
        return {
            name: self.parameters[name][
                index, : shape[0], : shape[1] if len(shape) == 2 else 1
            ].reshape(shape)
            for name, shape in self._shapes[index].items()
        }

    def model(self, index: int) -> nn.Module:
        """Return one network without the padding, as a module that shares the parameters."""
        architecture = _architecture(self._config, self.networks[index].width)
        return ConnectedModel(architecture, self._own(index))

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Copy one network's parameters without the padding, named and shaped as `fcn`'s."""
        return {name: tensor.detach().clone() for name, tensor in self._own(index).items()}

    def per_network(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm over all tensors (N, ...) of each network."""
        norms = [
            torch.linalg.vector_norm(t.flatten(1), dim=1, dtype=torch.float64) for t in tensors
        ]
        whole: Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        return whole

    def generators(self) -> list[torch.Generator]:
        """Return the generators of dropout."""
        return self._dropout

    def buffers(self) -> dict[str, Tensor]:
        """Return none: fully connected networks have no buffers."""
        return {}
