from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from experiments.data import ClassificationData, mnist1d, training_data
from lipfast.errors import ArgumentError


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


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(ArgumentError, match="train_size is 4001"):
        training_data(4001, 0.0, 0)
