"""Trains a group of networks together: updates, snapshots, logs, stopping, resumption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.losses import network_losses
from experiments.optimizers import OPTIMIZERS
from experiments.train.batches import Batches
from experiments.train.constraints import constrain_spectral_norms, jacobian_penalty
from experiments.train.measure import Measure
from experiments.train.networks import Group, LogRow, Network, Snapshot
from experiments.train.products import StackedGradients
from experiments.train.resume import ResumeFile
from experiments.train.single import SingleNetwork
from experiments.train.stacked import StackedNetworks


def _group(config: SweepConfig, networks: Sequence[Network]) -> Group:
    if config.model == "fcn":
        return StackedNetworks(config, networks)
    (network,) = networks
    return SingleNetwork(config, network)


class _Training:
    """The state of training a group: everything that an update reads or writes."""

    def __init__(
        self, config: SweepConfig, networks: Sequence[Network], data: ClassificationData
    ) -> None:
        self.config = config
        self.group = _group(config, networks)
        self.parameters = list(self.group.parameters.values())
        self.measure = Measure(config, self.group, data)
        self.optimizer = OPTIMIZERS[config.optimizer](
            self.parameters, config.lr, config.momentum, config.weight_decay
        )
        self.batches = Batches(config, self.group, data)
        self.alive = [True] * len(networks)
        self.step = 0
        self.path_length = torch.zeros(len(networks), dtype=torch.float64)
        self._start = self._copies()
        self._gradients: StackedGradients | None = None
        if isinstance(self.group, StackedNetworks) and StackedGradients.supports(config):
            self._gradients = StackedGradients(config, self.group)

    def _copies(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    def distances(self) -> list[float]:
        """Return the distance of every network from its start."""
        pairs = zip(self.parameters, self._start, strict=True)
        return self.group.per_network([p.detach() - start for p, start in pairs]).tolist()

    def weight_norms(self) -> list[float]:
        """Return the norm of the parameters of every network."""
        return self.group.per_network([p.detach() for p in self.parameters]).tolist()

    def _differentiate(self, x: Tensor, y: Tensor) -> None:
        """Set `grad` of the parameters by automatic differentiation."""
        config, group = self.config, self.group
        # The gradient of the sum is each network's own: no other loss depends on its weights.
        outputs = group.forward(x, training=True)
        loss = network_losses(config.loss, outputs, y, config.target_scale).sum()
        if config.lipschitz_penalty:
            loss = loss + config.lipschitz_penalty * jacobian_penalty(config, group, x)
        gradients = torch.autograd.grad(loss, self.parameters)
        for (name, parameter), gradient in zip(group.parameters.items(), gradients, strict=True):
            parameter.grad = gradient.mul_(group.masks[name]) if group.masks else gradient

    def update(self) -> None:
        """Make one update of all networks."""
        config, group = self.config, self.group
        before = self._copies() if config.path_length else []
        for settings in self.optimizer.param_groups:
            settings["lr"] = config.learning_rate(self.step)
        x, y = self.batches.at(self.step)
        if self._gradients is not None:
            self._gradients.write(x, y)
        else:
            self._differentiate(x, y)
        self.optimizer.step()
        if config.spectral_constraint:
            constrain_spectral_norms(group, config.spectral_constraint)
        if config.path_length:
            moves = [p.detach() - old for p, old in zip(self.parameters, before, strict=True)]
            self.path_length += group.per_network(moves)
        self.step += 1

    def state(self) -> dict[str, Any]:
        """Return copies of all that changes, for `restore`."""
        return {
            "step": self.step,
            "alive": list(self.alive),
            "parameters": self._copies(),
            "buffers": {name: t.clone() for name, t in self.group.buffers().items()},
            "optimizer": self.optimizer.state_dict(),
            "path_length": self.path_length,
            "order": self.batches.order,
            "generators": [generator.get_state() for generator in self._generators()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
            for name, buffer in self.group.buffers().items():
                buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.path_length = state["path_length"]
        self.batches.order = state["order"]
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)
        self.step, self.alive = state["step"], list(state["alive"])

    def _generators(self) -> list[torch.Generator]:
        return [*self.batches.generators, *self.group.generators()]


class _Recorder:
    """Turns the state of a group into snapshots and log rows; leaves out networks that have ended.

    Attributes:
        rows: the log of the whole training.
    """

    def __init__(self, training: _Training, on_snapshot: Callable[[Snapshot], None]) -> None:
        self._training, self._on_snapshot = training, on_snapshot
        self._checkpoints = frozenset(training.config.checkpoints)
        self._logged = frozenset(training.config.logged_steps)
        self.rows: list[LogRow] = []

    def _stop_reasons(self) -> dict[int, str]:
        """Return the networks that have reached what training was for, and what that is."""
        training, config = self._training, self._training.config
        epochs, within = divmod(training.step, config.steps_per_epoch)
        if not config.stops_early or within or epochs < max(config.min_epochs, 1):
            return {}
        if epochs % config.stop_every:
            return {}
        reasons: dict[int, str] = {}
        if config.stop_train_loss:
            losses = enumerate(training.measure.train_losses())
            reasons |= {i: "train_loss" for i, loss in losses if loss <= config.stop_train_loss}
        if config.stop_gradient_norm:
            norms = enumerate(training.measure.gradient_norms())
            reasons |= {i: "gradient_norm" for i, n in norms if n <= config.stop_gradient_norm}
        return {i: reason for i, reason in reasons.items() if training.alive[i]}

    def record(self) -> None:
        """Look at the networks after an update, or at the start."""
        training, config = self._training, self._training.config
        step, last = training.step, training.step == config.steps
        stopped = self._stop_reasons()
        if not (last or stopped or step in self._logged):
            return
        metrics = training.measure.metrics()
        columns = [
            training.measure.gradient_norms(),
            training.path_length.tolist(),
            training.distances(),
            training.weight_norms(),
        ]
        for index, network in enumerate(training.group.networks):
            wanted = last or index in stopped or step in self._logged
            if not (training.alive[index] and wanted):
                continue
            of_network = metrics[index]
            gradient, path, distance, norm = (column[index] for column in columns)
            diverged = not (math.isfinite(of_network.train_loss) and math.isfinite(norm))
            ended = "steps" if last else stopped.get(index, "")
            ended = "diverged" if diverged else ended
            training.alive[index] = not ended
            lr = config.learning_rate(min(step, max(config.steps - 1, 0)))
            path = path if config.path_length else math.nan
            row = LogRow(network, step, lr, of_network, gradient, path, distance, norm)
            self.rows.append(row)
            if ended or step in self._checkpoints:
                # A step that only other networks, or only the log, asked for has no checkpoint.
                state = None if diverged else training.group.state_dict(index)
                self._on_snapshot(Snapshot(network, step, state, of_network, diverged, ended))


def train_group(  # noqa: PLR0917
    config: SweepConfig,
    networks: Sequence[Network],
    data: ClassificationData,
    on_snapshot: Callable[[Snapshot], None],
    on_step: Callable[[int], None] = lambda step: None,
    resume: ResumeFile | None = None,
) -> list[LogRow]:
    """Train the networks together; each ends where training it alone would end, up to rounding.

    The result is a function of the arguments alone: no global generator is used. On one machine
    with one number of threads the same group gives the same bits, also when it was interrupted and
    goes on from `resume`.

    Args:
        config: the sweep.
        networks: of one sweep; any widths and seeds. One network, except for the model "fcn".
        data: training and test set.
        on_snapshot: called for each network at each step in `config.checkpoints`, and where it
            ends. Those of the steps up to the saved one are not repeated.
        on_step: called after every update with the number of updates made; what it raises
            interrupts the training.
        resume: where the state is saved now and then, and when training is interrupted.

    Returns:
        The log: a row for each network at each of `config.logged_steps`, and where it ends.
    """
    with torch.enable_grad():
        training = _Training(config, networks, data)
        recorder = _Recorder(training, on_snapshot)
        saved = resume.load() if resume is not None else None
        if saved is not None:
            training.restore(saved[0])
            recorder.rows = saved[1]
        else:
            recorder.record()
        while training.step < config.steps and any(training.alive):
            training.update()
            recorder.record()
            if resume is not None and resume.due():
                resume.save(training.state(), recorder.rows)
            try:
                on_step(training.step)
            except BaseException:
                if resume is not None:
                    resume.save(training.state(), recorder.rows)
                raise
    return recorder.rows
