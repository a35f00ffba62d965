"""What training offers beyond plain updates: stopping, logs, dropout, limits on the constant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import lipfast
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.models import build_model, fcn
from experiments.train import LogRow, Network, Snapshot, StackedNetworks, train_group
from experiments.train.constraints import constrain_spectral_norms, jacobian_penalty
from experiments.train.single import SingleNetwork

MakeConfig = Callable[..., SweepConfig]


def _train(
    config: SweepConfig, networks: Sequence[Network], data: ClassificationData
) -> tuple[dict[tuple[Network, int], Snapshot], list[LogRow]]:
    found: dict[tuple[Network, int], Snapshot] = {}

    def keep(snapshot: Snapshot) -> None:
        assert (snapshot.network, snapshot.step) not in found
        found[snapshot.network, snapshot.step] = snapshot

    rows = train_group(config, networks, data, keep)
    return found, rows


def _networks(config: SweepConfig) -> list[Network]:
    return [Network(width, seed) for width in config.widths for seed in config.seeds]


def _state(snapshots: dict[tuple[Network, int], Snapshot], key: tuple[Network, int]) -> Any:
    state = snapshots[key].state_dict
    assert state is not None
    return state


def test_logs_say_how_far_the_parameters_have_gone(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(
        steps=4, checkpoints=[0, 1, 2, 3, 4], lr=0.1, batch_size=10, path_length=True
    )
    snapshots, rows = _train(config, _networks(config), small_data)
    assert len(rows) == 6 * 5
    for network in _networks(config):
        states = [
            torch.cat([t.flatten() for t in _state(snapshots, (network, step)).values()]).double()
            for step in range(5)
        ]
        own = [row for row in rows if row.network == network]
        moves = [float((b - a).norm()) for a, b in itertools.pairwise(states)]
        for step, row in enumerate(own):
            assert row.step == step
            assert row.path_length == pytest.approx(sum(moves[:step]), rel=1e-5)
            assert row.distance == pytest.approx(float((states[step] - states[0]).norm()), rel=1e-5)
            assert row.weight_norm == pytest.approx(float(states[step].norm()), rel=1e-6)


def test_gradient_norms_are_those_of_the_whole_training_set(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(batch_size=10, loss="mse", optimizer="adam")
    snapshots, rows = _train(config, _networks(config), small_data)
    for row in rows:
        model = fcn(row.network.width)
        model.load_state_dict(_state(snapshots, (row.network, row.step)))
        outputs = model(small_data.x_train)
        targets = torch.nn.functional.one_hot(small_data.y_train, 10)
        loss = (outputs - targets).square().sum(1).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected = float(torch.cat([g.flatten() for g in gradients]).norm())
        assert row.gradient_norm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("criterion", ["stop_train_loss", "stop_gradient_norm"])
def test_each_network_stops_where_it_has_reached_its_goal(
    make_config: MakeConfig, small_data: ClassificationData, criterion: str
) -> None:
    common = {"widths": [3, 20, 60], "optimizer": "adam", "lr": 0.02, "batch_size": 12}
    steps = {"steps": 120, "checkpoints": [0, 50, 120], "log_points": 5}
    goal = {"stop_train_loss": 0.5, "stop_gradient_norm": 0.3}[criterion]
    config = make_config(**common, **steps, **{criterion: goal}, min_epochs=4, stop_every=2)
    snapshots, rows = _train(config, _networks(config), small_data)
    reason = criterion.removeprefix("stop_")
    ends = {key: s.ended for key, s in snapshots.items() if s.ended}
    assert len(ends) == len(_networks(config))
    assert set(ends.values()) <= {reason, "steps"}
    stopped = [key for key, ended in ends.items() if ended == reason]
    assert len(stopped) >= 2
    for network, step in ends:
        assert max(row.step for row in rows if row.network == network) == step
    column = {"train_loss": lambda row: row.metrics.train_loss}.get(
        reason, lambda row: row.gradient_norm
    )
    for network, step in stopped:
        assert 8 <= step < 120
        assert step % 4 == 0
        (last,) = [row for row in rows if row.network == network and row.step == step]
        assert column(last) <= goal


def test_networks_at_initialisation(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(steps=0, checkpoints=[0])
    snapshots, rows = _train(config, _networks(config), small_data)
    assert {(key[1], s.ended) for key, s in snapshots.items()} == {(0, "steps")}
    assert len(rows) == len(snapshots) == 6
    assert {row.distance for row in rows} == {0.0}


def test_dropout_of_a_network_does_not_depend_on_the_group(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(dropout=0.5, depth=2, optimizer="sgd", lr=0.1)
    together, _ = _train(config, _networks(config), small_data)
    alone, _ = _train(config, [Network(5, 1)], small_data)
    without, _ = _train(make_config(depth=2, optimizer="sgd", lr=0.1), [Network(5, 1)], small_data)
    key = Network(5, 1), config.steps
    mine, theirs = _state(alone, key), _state(together, key)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(mine["0.weight"], _state(without, key)["0.weight"], atol=1e-4)


def test_the_mean_of_dropout_is_the_activation(make_config: MakeConfig) -> None:
    config = make_config(widths=[8], dropout=0.25, train_size=4000)
    stack = StackedNetworks(config, [Network(8, 0)])
    x = torch.randn(40, 1, generator=torch.Generator().manual_seed(0)).expand(40, 100_000)
    with torch.no_grad():
        mean = stack.forward(x, training=True).mean(2)
        torch.testing.assert_close(mean, stack.forward(x).mean(2), rtol=0, atol=0.005)


def _largest_norm(state: dict[str, Tensor]) -> float:
    return max(float(torch.linalg.matrix_norm(t, 2)) for t in state.values() if t.dim() == 2)


def test_the_spectral_constraint_holds_after_every_update(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(spectral_constraint=0.7, optimizer="adam", lr=0.05, checkpoints=[0, 1, 6])
    snapshots, _ = _train(config, _networks(config), small_data)
    free, _ = _train(make_config(optimizer="adam", lr=0.05), _networks(config), small_data)
    for network, step in snapshots:
        norm = _largest_norm(_state(snapshots, (network, step)))
        assert step == 0 or norm <= 0.7 * (1 + 1e-5)
    for network in _networks(config):
        # Without the constraint the norms are larger; with it they reach the limit.
        assert _largest_norm(_state(free, (network, 6))) > 0.8
        assert _largest_norm(_state(snapshots, (network, 6))) >= 0.7 * (1 - 1e-5)


def test_the_spectral_constraint_scales_only_what_exceeds_it(make_config: MakeConfig) -> None:
    stack = StackedNetworks(make_config(widths=[3], seeds=[0, 1]), [Network(3, 0), Network(3, 1)])
    weight = stack.parameters["0.weight"]
    with torch.no_grad():
        weight[0] *= 2.5 / torch.linalg.matrix_norm(weight[0], 2)
        weight[1] *= 0.5 / torch.linalg.matrix_norm(weight[1], 2)
    before = weight.detach().clone()
    constrain_spectral_norms(stack, 1.0)
    torch.testing.assert_close(weight.detach()[0], before[0] / 2.5)
    assert torch.equal(weight.detach()[1], before[1])


def test_the_spectral_constraint_lets_diverged_networks_be(make_config: MakeConfig) -> None:
    stack = StackedNetworks(make_config(widths=[3], seeds=[0, 1]), [Network(3, 0), Network(3, 1)])
    weight = stack.parameters["0.weight"]
    with torch.no_grad():
        weight[0, 0, 0] = math.nan
        weight[1] *= 4 / torch.linalg.matrix_norm(weight[1], 2)
    constrain_spectral_norms(stack, 1.0)
    assert torch.linalg.matrix_norm(weight.detach()[1], 2) == pytest.approx(1.0, rel=1e-5)
    assert weight.detach()[0, 0, 0].isnan()
    with torch.no_grad():
        for tensor in stack.parameters.values():
            tensor.fill_(math.inf)
    constrain_spectral_norms(stack, 1.0)
    assert weight.detach().isinf().all()


def test_the_penalty_is_the_largest_jacobian_norm_and_lowers_it(
    make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(widths=[6, 9], penalty_samples=5)
    stack = StackedNetworks(config, _networks(config))
    penalty = jacobian_penalty(config, stack, stack.prepared(small_data.x_train))
    expected = 0.0
    for index, network in enumerate(_networks(config)):
        model = fcn(network.width)
        model.load_state_dict(stack.state_dict(index))
        expected += float(lipfast.jacobian_norms(model, small_data.x_train[:5]).max())
    assert float(penalty.detach()) == pytest.approx(expected, rel=1e-5)
    assert all(g is not None for g in torch.autograd.grad(penalty, stack.parameters["0.weight"]))
    common: dict[str, Any] = {"widths": [9], "seeds": [0], "steps": 25, "lr": 0.02}
    norms = []
    for penalised in (0.0, 1.0):
        settings = {**common, "optimizer": "adam", "lipschitz_penalty": penalised}
        config = make_config(checkpoints=[0, 25], penalty_samples=24, **settings)
        snapshots, _ = _train(config, [Network(9, 0)], small_data)
        model = fcn(9)
        model.load_state_dict(_state(snapshots, (Network(9, 0), 25)))
        norms.append(float(lipfast.jacobian_norms(model, small_data.x_train).max()))
    assert norms[1] < 0.7 * norms[0]


def _images(channels: int = 1, size: int = 8) -> ClassificationData:
    generator = torch.Generator().manual_seed(1)
    return ClassificationData(
        x_train=torch.rand(24, channels, size, size, generator=generator),
        y_train=torch.arange(24) % 10,
        x_test=torch.rand(7, channels, size, size, generator=generator),
        y_test=torch.arange(7) % 10,
    )


IMAGE_MODELS: list[dict[str, Any]] = [
    {"model": "cnn"},
    {"model": "resnet", "depth": 20},
    {"model": "vit", "depth": 1, "heads": 2, "head_features": 3, "patch": 4},
]


@pytest.mark.parametrize("settings", IMAGE_MODELS, ids=lambda s: s["model"])
def test_models_of_images_train_and_are_rebuilt_from_metadata(
    make_config: MakeConfig, settings: dict[str, Any]
) -> None:
    config = make_config(
        widths=[4], seeds=[0], data="digits", steps=3, optimizer="adam", batch_size=10, **settings
    )
    global_state = torch.random.get_rng_state()
    snapshots, rows = _train(config, [Network(4, 0)], _images())
    assert torch.equal(torch.random.get_rng_state(), global_state)
    assert rows[-1].metrics.train_loss != rows[0].metrics.train_loss
    metadata = {**config.settings(), **config.architecture(), "width": 4}
    model = build_model({key: str(value).lower() for key, value in metadata.items()})
    model.load_state_dict(_state(snapshots, (Network(4, 0), 3)))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(_images().x_test), _images().y_test)
    assert rows[-1].metrics.test_loss == pytest.approx(float(loss), rel=1e-5)


def test_the_start_of_other_models_is_pytorchs_own(make_config: MakeConfig) -> None:
    config = make_config(model="cnn", data="digits", widths=[3])
    torch.manual_seed(5)
    expected = build_model({**config.settings(), **config.architecture(), "width": 3}).state_dict()
    state = SingleNetwork(config, Network(3, 5)).state_dict(0)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_diverged_network_ends(make_config: MakeConfig, small_data: ClassificationData) -> None:
    config = make_config(lr=1e30, steps=9, checkpoints=[0, 3, 6, 9], widths=[3], seeds=[0])
    snapshots, rows = _train(config, _networks(config), small_data)
    last = snapshots[Network(3, 0), 3]
    assert (last.ended, last.diverged, last.state_dict) == ("diverged", True, None)
    assert max(step for _, step in snapshots) == 3
    assert not math.isfinite(rows[-1].metrics.train_loss) or not math.isfinite(rows[-1].weight_norm)


def test_norms_of_huge_parameters_do_not_overflow(make_config: MakeConfig) -> None:
    config = make_config(widths=[3])
    stack = StackedNetworks(config, [Network(3, 0)])
    huge: list[Tensor] = [torch.full((1, 2, 2), 1e30)]
    assert float(stack.per_network(huge)) == pytest.approx(2e30)
