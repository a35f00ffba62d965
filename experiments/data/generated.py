"""MNIST1D (Greydanus and Kobak, 2020), generated, never downloaded."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

from experiments.data.dataset import ClassificationData
from experiments.data.label_noise import with_label_noise
from lipfast.errors import ArgumentError

TRAIN_SAMPLES = 4000
TEST_SAMPLES = 1000
INPUTS = 40
CLASSES = 10
_lock = threading.Lock()


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Restore the state of the global generators of `random` and numpy."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@cache
def _generated() -> ClassificationData:
    from mnist1d.data import get_dataset_args, make_dataset  # noqa: PLC0415  # a slow extra

    with _global_generators_kept():
        raw = make_dataset(get_dataset_args())
    return ClassificationData(
        x_train=torch.from_numpy(raw["x"]).float(),
        y_train=torch.from_numpy(raw["y"]).long(),
        x_test=torch.from_numpy(raw["x_test"]).float(),
        y_test=torch.from_numpy(raw["y_test"]).long(),
    )


def mnist1d() -> ClassificationData:
    """Generate all of MNIST1D with the seed of its authors, 42; once per process.

    4000 training and 1000 test samples of 40 inputs in 10 classes, mean 0 and standard deviation 1
    over the whole set. The generator draws from the global generators of `random` and numpy; their
    states are left as found.
    """
    with _lock:
        full = _generated()
    return ClassificationData(
        x_train=full.x_train.clone(),
        y_train=full.y_train.clone(),
        x_test=full.x_test.clone(),
        y_test=full.y_test.clone(),
    )


def training_data(train_size: int, label_noise: float, seed: int) -> ClassificationData:
    """Generate MNIST1D with its first `train_size` training samples and label noise on them.

    Args:
        train_size: 1 to 4000; the generator has shuffled the samples already.
        label_noise: fraction of the training labels that are redrawn.
        seed: of the label noise.

    Returns:
        The training subset, and the whole test set with its true labels.

    Raises:
        ArgumentError: train_size or label_noise is out of range.
    """
    if not 1 <= train_size <= TRAIN_SAMPLES:
        raise ArgumentError(f"train_size is {train_size}; MNIST1D has 1 to {TRAIN_SAMPLES}")
    full = mnist1d()
    true = full.y_train[:train_size].clone()
    return ClassificationData(
        x_train=full.x_train[:train_size].clone(),
        y_train=with_label_noise(true, label_noise, seed),
        x_test=full.x_test,
        y_test=full.y_test,
        y_train_true=true,
    )
