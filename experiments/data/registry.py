"""The data sets by name: what the key `data` of a sweep may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import files, generated, packaged
from experiments.data.dataset import ClassificationData
from experiments.data.label_noise import with_label_noise
from lipfast.errors import ArgumentError

if TYPE_CHECKING:
    from experiments.config import SweepConfig


@dataclass(frozen=True)
class DataSet:
    """What a configuration must know of a data set before it is read.

    Attributes:
        shape: of a sample; sizes of 0 are set by `image_size`.
        classes: how many; None where only the files say it.
        train_samples: how many; None where only the files say it.
        load: of the configuration, all samples.
        needs_folder: whether the user supplies the files (the key `data_folder`).
    """

    shape: tuple[int, ...]
    classes: int | None
    train_samples: int | None
    load: Callable[[SweepConfig], ClassificationData]
    needs_folder: bool = False


def _folder(config: SweepConfig) -> Path:
    return Path(config.data_folder).expanduser()


def _packaged(load: Callable[[], ClassificationData], config: SweepConfig) -> ClassificationData:
    return load()


DATA_SETS: dict[str, DataSet] = {
    "mnist1d": DataSet((40,), 10, 4000, partial(_packaged, generated.mnist1d)),
    "blobs": DataSet((2,), 3, 300, partial(_packaged, packaged.blobs)),
    "mnist_sample": DataSet((1, 28, 28), 10, 4000, partial(_packaged, packaged.mnist_sample)),
    "digits": DataSet((1, 8, 8), 10, 1397, partial(_packaged, packaged.digits)),
    "mnist": DataSet((1, 28, 28), 10, 60_000, lambda c: files.mnist(_folder(c)), True),
    "cifar10": DataSet((3, 32, 32), 10, 50_000, lambda c: files.cifar10(_folder(c)), True),
    "cifar100": DataSet((3, 32, 32), 20, 50_000, lambda c: files.cifar100(_folder(c)), True),
    "image_folder": DataSet(
        (3, 0, 0), None, None, lambda c: files.image_folder(_folder(c), c.image_size), True
    ),
}


def averaged_down(images: Tensor, size: int) -> Tensor:
    """Average square blocks of pixels: (samples, channels, H, H) to (..., size, size).

    Raises:
        ArgumentError: H is no multiple of size.
    """
    height = images.shape[-1]
    if height % size:
        raise ArgumentError(f"image_size = {size}: {height} is no multiple of it")
    return functional.avg_pool2d(images, height // size) if height != size else images


def load_data(config: SweepConfig) -> ClassificationData:
    """Load the training and test set of a sweep: subset, averaged down, with label noise.

    Args:
        config: its keys about data; samples are flat for the model "fcn".

    Raises:
        ArgumentError: files are missing or damaged, or do not fit the configuration.
    """
    full = DATA_SETS[config.data].load(config)
    if config.train_size > len(full.y_train):
        raise ArgumentError(
            f"train_size = {config.train_size}: there are only {len(full.y_train)} samples"
        )
    true = full.y_train[: config.train_size].clone()
    if int(torch.cat([true, full.y_test]).max()) >= config.classes:
        raise ArgumentError(f"classes = {config.classes}: the data has more")

    def prepared(x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = averaged_down(x, config.image_size)
        return x.flatten(1).contiguous() if config.model == "fcn" else x.contiguous()

    return ClassificationData(
        x_train=prepared(full.x_train[: config.train_size]),
        y_train=with_label_noise(
            true, config.label_noise, config.data_seed, config.classes, config.label_noise_kind
        ),
        x_test=prepared(full.x_test),
        y_test=full.y_test,
        y_train_true=true,
    )
