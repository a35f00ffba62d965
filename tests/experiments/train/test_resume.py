"""Resumption after a kill: the same bits as an undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.train import LogRow, Network, ResumeFile, Snapshot, train_group

MakeConfig = Callable[..., SweepConfig]
SETTINGS: list[dict[str, Any]] = [
    {"optimizer": "adam", "batch_size": 7, "dropout": 0.3, "schedule": "cosine"},
    {"optimizer": "sgd", "momentum": 0.9, "batch_size": 7, "path_length": True, "lr": 0.1},
    {"optimizer": "adamw", "spectral_constraint": 0.9, "batch_size": 10},
]
IMAGES: list[dict[str, Any]] = [
    {"model": "cnn", "dropout": 0.2, "image_size": 7, "batch_size": 10, "optimizer": "adam"},
    {"model": "resnet", "image_size": 7, "batch_size": 10, "momentum": 0.9},
]


class _KilledError(Exception):
    pass


def _train(
    config: SweepConfig,
    networks: list[Network],
    data: ClassificationData,
    resume: ResumeFile | None = None,
    kill_after: int | None = None,
) -> tuple[dict[Any, Snapshot], list[LogRow]]:
    found: dict[Any, Snapshot] = {}

    def keep(snapshot: Snapshot) -> None:
        found[snapshot.network, snapshot.step] = snapshot

    def on_step(step: int) -> None:
        if step == kill_after:
            raise _KilledError

    rows = train_group(config, networks, data, keep, on_step, resume)
    return found, rows


def _images(classes: int = 10) -> ClassificationData:
    generator = torch.Generator().manual_seed(1)
    return ClassificationData(
        x_train=torch.rand(24, 1, 7, 7, generator=generator),
        y_train=torch.randint(classes, (24,), generator=generator),
        x_test=torch.rand(9, 1, 7, 7, generator=generator),
        y_test=torch.randint(classes, (9,), generator=generator),
    )


def _assert_goes_on_exactly(
    config: SweepConfig,
    networks: list[Network],
    data: ClassificationData,
    path: Path,
    kills: tuple[int, ...] = (1, 4),
) -> None:
    whole, rows = _train(config, networks, data)
    for kill_after in kills:
        resume = ResumeFile(path)
        with pytest.raises(_KilledError):
            _train(config, networks, data, resume, kill_after)
        later, resumed = _train(config, networks, data, ResumeFile(path))
        assert repr(resumed) == repr(rows)  # as text: NaN is equal to itself
        assert {step for _, step in later} == {s for s in config.checkpoints if s > kill_after}
        for key, snapshot in later.items():
            state, expected = snapshot.state_dict, whole[key].state_dict
            assert state is not None
            assert expected is not None
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in state)
        resume.remove()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s["optimizer"])
def test_resuming_is_exact(
    tmp_path: Path,
    make_config: MakeConfig,
    small_data: ClassificationData,
    settings: dict[str, Any],
) -> None:
    config = make_config(steps=9, checkpoints=[0, 2, 5, 9], log_points=6, **settings)
    networks = [Network(width, seed) for width in config.widths for seed in config.seeds]
    _assert_goes_on_exactly(config, networks, small_data, tmp_path / "state.pt")


@pytest.mark.parametrize("settings", IMAGES, ids=lambda s: s["model"])
def test_resuming_is_exact_for_images(
    tmp_path: Path, make_config: MakeConfig, settings: dict[str, Any]
) -> None:
    config = make_config(
        widths=[2], steps=4, checkpoints=[0, 2, 4], data="mnist_sample", **settings
    )
    _assert_goes_on_exactly(config, [Network(2, 0)], _images(), tmp_path / "state.pt", (3,))


def test_a_damaged_state_starts_anew(
    tmp_path: Path, make_config: MakeConfig, small_data: ClassificationData
) -> None:
    config = make_config(widths=[3])
    path = tmp_path / "state.pt"
    whole, _ = _train(config, [Network(3, 0)], small_data)
    for content in (b"", b"PK\3\4 half a file"):
        path.write_bytes(content)
        again, _ = _train(config, [Network(3, 0)], small_data, ResumeFile(path))
        assert again.keys() == whole.keys()
