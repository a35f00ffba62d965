"""MNIST1D, generated (never downloaded), with label noise, as one `.safetensors` file."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from experiments.files import write_whole
from lipfast.errors import ArgumentError, CheckpointError

TRAIN_SAMPLES = 4000
TEST_SAMPLES = 1000
INPUTS = 40
CLASSES = 10
_NAMES = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class ClassificationData:
    """A training set and a test set of labelled samples.

    Attributes:
        x_train: float32 (samples, inputs).
        y_train: int64 (samples,), with label noise where there is any.
        x_test: float32 (test samples, inputs).
        y_test: int64 (test samples,), always the true labels.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    def save(self, path: Path) -> None:
        """Write the four tensors under their names; a reader never sees half a file."""
        write_whole(path, save({name: getattr(self, name).contiguous() for name in _NAMES}))

    @staticmethod
    def load(path: Path) -> ClassificationData:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is damaged or holds other tensors.
        """
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a data file ({error}); delete it") from None
        if set(tensors) != set(_NAMES):
            raise CheckpointError(
                f"{path}: holds {sorted(tensors)}, expected {sorted(_NAMES)}; delete it"
            )
        return ClassificationData(**tensors)


@contextmanager
def _global_generators_kept() -> Iterator[None]:
    """Restore the state of the global generators of `random` and numpy."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def mnist1d() -> ClassificationData:
    """Generate all of MNIST1D (Greydanus and Kobak, 2020) with the seed of its authors, 42.

    4000 training and 1000 test samples of 40 inputs in 10 classes, mean 0 and standard deviation 1
    over the whole set. The generator draws from the global generators of `random` and numpy; their
    states are left as found.
    """
    # Here, because importing it also imports its plotting and download code.
    from mnist1d.data import get_dataset_args, make_dataset  # noqa: PLC0415

    with _global_generators_kept():
        raw = make_dataset(get_dataset_args())
    return ClassificationData(
        x_train=torch.from_numpy(raw["x"]).float(),
        y_train=torch.from_numpy(raw["y"]).long(),
        x_test=torch.from_numpy(raw["x_test"]).float(),
        y_test=torch.from_numpy(raw["y_test"]).long(),
    )


def with_label_noise(labels: Tensor, fraction: float, seed: int, classes: int = CLASSES) -> Tensor:
    """Redraw `round(fraction * len(labels))` of the labels uniformly from all classes.

    A redrawn label keeps its old value with probability 1/classes. The same seed redraws nested
    sets: what a smaller fraction redraws, a larger one redraws too, to the same values.

    Args:
        labels: int64 (samples,).
        fraction: between 0 and 1.
        seed: of the choice of samples and of the new labels.
        classes: labels are drawn from 0 to classes - 1.

    Returns:
        A new int64 tensor (samples,).

    Raises:
        ArgumentError: the fraction is outside [0, 1].

    Example:
        >>> labels = torch.zeros(1000, dtype=torch.int64)
        >>> noisy = with_label_noise(labels, 0.2, seed=0)
        >>> 150 < int((noisy != labels).sum()) <= 200
        True
    """
    if not 0 <= fraction <= 1:
        raise ArgumentError(f"label_noise is {fraction}; it must be between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(classes, (len(labels),), generator=generator)
    chosen = order[: round(fraction * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = drawn[chosen]
    return noisy


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
    return ClassificationData(
        x_train=full.x_train[:train_size].clone(),
        y_train=with_label_noise(full.y_train[:train_size], label_noise, seed),
        x_test=full.x_test,
        y_test=full.y_test,
    )
