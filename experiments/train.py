"""Trains many small networks together: weights stacked, one batched product per layer.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.config import SweepConfig
from experiments.data import CLASSES, INPUTS, ClassificationData
from experiments.models import fcn

# Elements of one hidden layer's activations in a group (float32: 256 MiB).
_ACTIVATION_LIMIT = 1 << 26
# A step of a group costs about 0.3 ms however small the networks are: as much as this many
# activations. Measured on two cores.
_GROUP_OVERHEAD = 150_000
# Separates the order of the mini-batches from the initial weights of the same seed.
_BATCH_ORDER_SEED = 0x5EED_0000_0000


@dataclass(frozen=True)
class Network:
    """One network of a sweep.

    Attributes:
        width: units per hidden layer.
        seed: of its initial weights and of the order of its mini-batches.
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
class Snapshot:
    """One network at one of the steps at which checkpoints are written.

    Attributes:
        network: which network.
        step: number of updates made.
        state_dict: names and shapes of `fcn` at the network's own width; None when it diverged.
        metrics: at this step.
        diverged: a weight or the training loss is NaN or infinite. Reported once; the network
            has no later snapshots.
    """

    network: Network
    step: int
    state_dict: dict[str, Tensor] | None
    metrics: Metrics
    diverged: bool


def _architecture(config: SweepConfig, width: int) -> nn.Sequential:
    with torch.device("meta"):
        return fcn(
            width,
            config.depth,
            INPUTS,
            CLASSES,
            config.bias,
            config.activation,
            config.output_activation,
        )


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
    """

    def __init__(self, config: SweepConfig, networks: Sequence[Network]) -> None:
        self.networks = tuple(networks)
        width = max(network.width for network in networks)
        self._modules = list(_architecture(config, width).named_children())
        states = [initial_state(config, network) for network in networks]
        self._shapes = [{name: t.shape for name, t in state.items()} for state in states]
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

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate all networks.

        Args:
            x: (inputs, batch) for all networks alike, or (N, inputs, batch).

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
            else:
                hidden = module(hidden)
        return hidden

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """Copy one network's parameters without the padding, named and shaped as `fcn`'s."""
        return {
            name: self.parameters[name]
            .detach()[index, : shape[0], : shape[1] if len(shape) == 2 else 1]
            .reshape(shape)
            .clone()
            for name, shape in self._shapes[index].items()
        }


def network_losses(config: SweepConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    """Average over samples, per network, the cross-entropy or `sum_k (f_k - c onehot_k)^2`.

    Args:
        config: names the loss and the target scale c.
        outputs: (N, classes, batch).
        labels: int64 (N, batch), or (batch,) for all networks alike.

    Returns:
        (N,).
    """
    labels = labels.expand(outputs.shape[0], outputs.shape[2])
    if config.loss == "cross_entropy":
        return functional.cross_entropy(outputs, labels, reduction="none").mean(dim=1)
    # (f_k - c)^2 = f_k^2 + c^2 - 2 c f_k at the label: no one-hot tensor is built.
    at_label = outputs.gather(1, labels.unsqueeze(1)).squeeze(1)
    scale = config.target_scale
    per_sample = outputs.square().sum(dim=1) + scale * scale - 2 * scale * at_label
    return per_sample.mean(dim=1)


def learning_rate(config: SweepConfig, step: int) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    Linear warm-up `lr (step + 1) / warmup_steps`, then `lr` or, for "cosine",
    `lr (1 + cos(pi t)) / 2` with t from 0 to 1 over the steps that follow the warm-up.

    Args:
        config: names the schedule.
        step: 0 to steps - 1.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def _optimizer(config: SweepConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


class _Batches:
    """The mini-batches of a group; each network has the order that its seed gives."""

    def __init__(
        self, config: SweepConfig, networks: Sequence[Network], data: ClassificationData
    ) -> None:
        self._config = config
        self._x, self._y = data.x_train.t().contiguous(), data.y_train
        self._generators = [
            torch.Generator().manual_seed(_BATCH_ORDER_SEED + network.seed) for network in networks
        ]
        self._order = torch.empty(0)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Return samples as columns and labels of update `step`; call it for 0, 1, 2, ..."""
        config = self._config
        if config.batch_size == config.train_size:
            return self._x, self._y
        within = step % config.steps_per_epoch
        if within == 0:
            orders = [torch.randperm(config.train_size, generator=g) for g in self._generators]
            self._order = torch.stack(orders)
        chosen = self._order[:, within * config.batch_size : (within + 1) * config.batch_size]
        return self._x[:, chosen].transpose(0, 1), self._y[chosen]


def _evaluate(
    config: SweepConfig, stack: StackedNetworks, data: ClassificationData
) -> list[Metrics]:
    columns: list[list[float]] = []
    with torch.no_grad():
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            outputs = stack.forward(x.t())
            columns.append(network_losses(config, outputs, y).tolist())
            columns.append((outputs.argmax(dim=1) != y).double().mean(dim=1).tolist())
    return [
        Metrics(train_loss, test_loss, train_error, test_error)
        for train_loss, train_error, test_loss, test_error in zip(*columns, strict=True)
    ]


class _Recorder:
    """Turns the state of a group into snapshots and leaves out networks that have diverged."""

    def __init__(
        self,
        config: SweepConfig,
        stack: StackedNetworks,
        data: ClassificationData,
        on_snapshot: Callable[[Snapshot], None],
    ) -> None:
        self._config, self._stack, self._data = config, stack, data
        self._on_snapshot = on_snapshot
        self.alive = [True] * len(stack.networks)

    def record(self, step: int) -> None:
        metrics = _evaluate(self._config, self._stack, self._data)
        for index, network in enumerate(self._stack.networks):
            if not self.alive[index]:
                continue
            state = self._stack.state_dict(index)
            finite = math.isfinite(metrics[index].train_loss)
            finite = finite and all(bool(tensor.isfinite().all()) for tensor in state.values())
            self.alive[index] = finite
            self._on_snapshot(
                Snapshot(network, step, state if finite else None, metrics[index], not finite)
            )


def _update(
    config: SweepConfig,
    stack: StackedNetworks,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
) -> None:
    # The gradient of the sum is each network's own gradient: no other loss depends on its weights.
    loss = network_losses(config, stack.forward(x), y).sum()
    gradients = torch.autograd.grad(loss, list(stack.parameters.values()))
    for (name, parameter), gradient in zip(stack.parameters.items(), gradients, strict=True):
        parameter.grad = gradient.mul_(stack.masks[name]) if stack.masks else gradient
    optimizer.step()


def train_group(
    config: SweepConfig,
    networks: Sequence[Network],
    data: ClassificationData,
    on_snapshot: Callable[[Snapshot], None],
    on_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the networks together; each ends where training it alone would end, up to rounding.

    The result is a function of the arguments alone: no global generator is used. On one machine
    with one number of threads the same group gives the same bits.

    Args:
        config: the sweep.
        networks: of one sweep; any widths and seeds.
        data: training and test set.
        on_snapshot: called for each network at each step in `config.checkpoints`.
        on_step: called after every update with the number of updates made.
    """
    with torch.enable_grad():
        stack = StackedNetworks(config, networks)
        recorder = _Recorder(config, stack, data, on_snapshot)
        optimizer = _optimizer(config, list(stack.parameters.values()))
        batches = _Batches(config, networks, data)
        wanted = frozenset(config.checkpoints)
        for step in range(config.steps + 1):
            if step in wanted:
                recorder.record(step)
            if step == config.steps or not any(recorder.alive):
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            _update(config, stack, optimizer, *batches.at(step))
            on_step(step + 1)


def group_networks(config: SweepConfig) -> list[tuple[Network, ...]]:
    """Split a sweep into groups to be trained together, at the least estimated cost.

    Padding wastes arithmetic, groups cost a fixed time per step: dynamic programming over the
    sorted widths finds the cheapest split. All seeds of a width share a group unless that needs
    too much memory. The split depends on the configuration only, so that a sweep that is resumed
    repeats the same arithmetic.

    Args:
        config: the sweep.

    Returns:
        Groups of networks, in ascending order of width.
    """
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
