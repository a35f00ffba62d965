from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.data import ClassificationData, mnist1d, training_data, with_label_noise
from lipfast.errors import ArgumentError, CheckpointError


@pytest.fixture(scope="module")
def full() -> ClassificationData:
    return mnist1d()


def test_mnist1d_is_the_published_size_and_scale(full: ClassificationData) -> None:
    assert full.x_train.shape == (4000, 40)
    assert full.x_test.shape == (1000, 40)
    assert full.x_train.dtype == torch.float32
    assert full.y_train.dtype == torch.int64
    assert torch.bincount(torch.cat([full.y_train, full.y_test])).tolist() == [500] * 10
    everything = torch.cat([full.x_train, full.x_test]).double()
    assert everything.mean().abs() < 1e-6
    assert abs(everything.std(correction=0) - 1) < 1e-6


def test_generating_is_deterministic_and_leaves_global_generators(
    full: ClassificationData,
) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    data = training_data(400, 0.0, seed=0)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    assert torch.equal(data.x_train, full.x_train[:400])
    assert torch.equal(data.y_train, full.y_train[:400])


@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_label_noise_changes_the_expected_fraction(fraction: float) -> None:
    labels = torch.arange(20_000) % 10
    noisy = with_label_noise(labels, fraction, seed=3)
    # A tenth of the redrawn labels keep their value; five standard deviations of that count.
    expected, spread = 0.9 * fraction, (0.09 * fraction / 20_000) ** 0.5
    assert abs((noisy != labels).double().mean().item() - expected) <= 5 * spread
    assert labels.equal(torch.arange(20_000) % 10)
    assert int(noisy.min()) >= 0
    assert int(noisy.max()) <= 9


def test_label_noise_is_seeded_and_nested() -> None:
    labels = torch.zeros(500, dtype=torch.int64)
    assert torch.equal(with_label_noise(labels, 0.3, 1), with_label_noise(labels, 0.3, 1))
    assert not torch.equal(with_label_noise(labels, 0.3, 1), with_label_noise(labels, 0.3, 2))
    less, more = with_label_noise(labels, 0.2, 1), with_label_noise(labels, 0.6, 1)
    assert torch.equal(less[less != 0], more[less != 0])


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"label_noise is 1\.5"):
        with_label_noise(torch.zeros(3, dtype=torch.int64), 1.5, 0)
    with pytest.raises(ArgumentError, match="train_size is 4001"):
        training_data(4001, 0.0, 0)


def test_data_round_trip_and_damage(tmp_path: Path, small_data: ClassificationData) -> None:
    path = tmp_path / "data.safetensors"
    small_data.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.safetensors"]
    loaded = ClassificationData.load(path)
    assert torch.equal(loaded.x_train, small_data.x_train)
    assert torch.equal(loaded.y_test, small_data.y_test)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"data\.safetensors: not a data file"):
        ClassificationData.load(path)
