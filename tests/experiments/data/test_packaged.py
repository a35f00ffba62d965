from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from experiments.data.packaged import blobs, digits, mnist_sample


@pytest.mark.parametrize(
    ("load", "shape", "classes"),
    [(mnist_sample, (4000, 1, 28, 28), 10), (digits, (1397, 1, 8, 8), 10), (blobs, (300, 2), 3)],
)
def test_data_in_packages(load: Callable[[], Any], shape: tuple[int, ...], classes: int) -> None:
    data = load()
    assert data.x_train.shape == shape
    assert data.x_train.dtype == torch.float32
    assert sorted(data.y_train.unique().tolist()) == list(range(classes))
    assert len(data.y_test) == len(data.x_test) > 0
    assert torch.equal(load().x_train, data.x_train)
    if len(shape) == 4:
        assert (float(data.x_train.min()), float(data.x_train.max())) == (0, 1)
