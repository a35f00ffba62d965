from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.models import fcn
from experiments.train import (
    Network,
    Snapshot,
    StackedNetworks,
    initial_state,
    train_group,
)

MakeConfig = Callable[..., SweepConfig]


def _train(
    config: SweepConfig, networks: Sequence[Network], data: ClassificationData
) -> dict[tuple[Network, int], Snapshot]:
    snapshots: dict[tuple[Network, int], Snapshot] = {}

    def keep(snapshot: Snapshot) -> None:
        snapshots[snapshot.network, snapshot.step] = snapshot

    train_group(config, networks, data, keep)
    return snapshots


def _networks(config: SweepConfig) -> list[Network]:
    return [Network(width, seed) for width in config.widths for seed in config.seeds]


def _plain_training(
    config: SweepConfig, network: Network, data: ClassificationData
) -> dict[str, Tensor]:
    """Full-batch training of one unpadded module, written as anyone would."""
    torch.manual_seed(network.seed)
    model = fcn(
        network.width,
        config.depth,
        bias=config.bias,
        activation=config.activation,
        output_activation=config.output_activation,
    )
    decay = config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, momentum=config.momentum, weight_decay=decay
        )
    else:
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        optimizer = kind(model.parameters(), config.lr, weight_decay=decay)
    targets = config.target_scale * functional.one_hot(data.y_train, 10).float()
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        outputs = model(data.x_train)
        if config.loss == "mse":
            loss = (outputs - targets).square().sum(dim=1).mean()
        else:
            loss = functional.cross_entropy(outputs, data.y_train)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "lr": 0.1},
    {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "bias": False},
    {"optimizer": "adam", "schedule": "cosine", "depth": 2},
    {"optimizer": "adam", "weight_decay": 0.01, "activation": "sigmoid", "warmup_steps": 2},
    {"optimizer": "adamw", "weight_decay": 0.1, "activation": "gelu", "depth": 3},
    {"optimizer": "sgd", "loss": "mse", "target_scale": 3.0, "output_activation": "leaky_relu"},
    {"optimizer": "adam", "output_activation": "softmax", "activation": "tanh"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
def test_a_group_trains_as_plain_modules_do(
    make_config: MakeConfig, small_data: ClassificationData, settings: dict[str, Any]
) -> None:
    config = make_config(**settings)
    together = _train(config, _networks(config), small_data)
    for network in _networks(config):
        expected = _plain_training(config, network, small_data)
        state = together[network, config.steps].state_dict
        assert state is not None
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            # Adam divides by the root of the squared gradient: rounding of gradients near zero
            # moves a weight by up to a few hundredths of lr.
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=2e-4)


def test_mini_batches_do_not_depend_on_the_group(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(batch_size=7, steps=9, optimizer="sgd", lr=0.1)
    together = _train(config, _networks(config), small_data)
    for network in _networks(config):
        alone = _train(config, [network], small_data)[network, 9].state_dict
        state = together[network, 9].state_dict
        assert state is not None
        assert alone is not None
        for name, tensor in alone.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)
    first, second = (together[Network(8, seed), 9].state_dict for seed in (0, 1))
    assert first is not None
    assert second is not None
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_an_epoch_uses_every_sample_once(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    # One epoch of SGD at a tiny rate adds up the gradients of all samples, weighted by batch.
    config = make_config(batch_size=8, steps=3, optimizer="sgd", lr=1e-3, widths=[5], seeds=[0])
    full = make_config(steps=1, checkpoints=2, optimizer="sgd", lr=3e-3, widths=[5], seeds=[0])
    network = Network(5, 0)
    batched = _train(config, [network], small_data)[network, 3].state_dict
    whole = _train(full, [network], small_data)[network, 1].state_dict
    assert batched is not None
    assert whole is not None
    torch.testing.assert_close(batched["2.weight"], whole["2.weight"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_padding_stays_exactly_zero(
    make_config: MakeConfig,
    small_data: ClassificationData,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    activation: str,
) -> None:
    made: list[StackedNetworks] = []
    original = StackedNetworks.__init__

    def remember(self: StackedNetworks, *arguments: Any) -> None:
        original(self, *arguments)
        made.append(self)

    monkeypatch.setattr(StackedNetworks, "__init__", remember)
    config = make_config(optimizer=optimizer, activation=activation, weight_decay=0.1, depth=2)
    _train(config, _networks(config), small_data)
    (stack,) = made
    for name, parameter in stack.parameters.items():
        padding = parameter.detach()[(stack.masks[name] == 0).expand_as(parameter)]
        assert name == "4.bias" or padding.numel() > 0
        assert not padding.any()


def test_the_start_is_pytorchs_own(make_config: MakeConfig) -> None:
    config = make_config(depth=2)
    for network in _networks(config):
        torch.manual_seed(network.seed)
        expected = fcn(network.width, depth=2).state_dict()
        state = initial_state(config, network)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_metrics_are_those_of_the_module(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(optimizer="adam", lr=0.05)
    for (network, _), snapshot in _train(config, _networks(config), small_data).items():
        assert snapshot.state_dict is not None
        model = fcn(network.width)
        model.load_state_dict(snapshot.state_dict)
        with torch.no_grad():
            outputs = model(small_data.x_test)
        loss = functional.cross_entropy(outputs, small_data.y_test).item()
        error = (outputs.argmax(1) != small_data.y_test).double().mean().item()
        assert snapshot.metrics.test_loss == pytest.approx(loss, rel=1e-5)
        assert snapshot.metrics.test_error == error


def test_a_diverged_network_leaves_the_others_alone(
    make_config: MakeConfig, small_data: ClassificationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(optimizer="sgd", lr=0.1, checkpoints=[0, 2, 4, 6])
    bad = Network(5, 1)

    def overflowing(config: SweepConfig, network: Network) -> dict[str, Tensor]:
        state = initial_state(config, network)
        return {name: tensor * 1e30 for name, tensor in state.items()} if network == bad else state

    clean = _train(config, _networks(config), small_data)
    monkeypatch.setattr("experiments.train.stacked.initial_state", overflowing)
    mixed = _train(config, _networks(config), small_data)
    of_bad = [snapshot for (network, _), snapshot in mixed.items() if network == bad]
    assert of_bad[-1].diverged
    assert of_bad[-1].state_dict is None
    assert sum(snapshot.diverged for snapshot in of_bad) == 1
    for key, snapshot in clean.items():
        if key[0] != bad:
            assert snapshot.state_dict is not None
            state = mixed[key].state_dict
            assert state is not None
            assert all(torch.equal(state[n], t) for n, t in snapshot.state_dict.items())


def test_global_state_is_left_as_found(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(batch_size=7)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        snapshots = _train(config, _networks(config), small_data)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)
    first, last = (snapshots[Network(8, 0), step].metrics for step in (0, config.steps))
    assert last.train_loss < first.train_loss
