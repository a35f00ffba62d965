"""The data sets by name: what the key `data` of a sweep may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from experiments.data import files, generated, packaged
from experiments.data.dataset import ClassificationData
from experiments.data.label_noise import with_label_noise
from lipfast.errors import ArgumentError

# Of the folder of the user's files and of `image_size`.
Load = Callable[[Path, int], ClassificationData]


@dataclass(frozen=True)
class DataSet:
    """What a configuration must know of a data set before it is read.

    Attributes:
        shape: of a sample; sizes of 0 are set by `image_size`.
        classes: how many; None where only the files say it.
        train_samples: how many; None where only the files say it.
        load: all samples.
        needs_folder: whether the user supplies the files (the key `data_folder`).
    """

    shape: tuple[int, ...]
    classes: int | None
    train_samples: int | None
    load: Load
    needs_folder: bool = False


def _without_files(load: Callable[[], ClassificationData]) -> Load:
    return lambda folder, image_size: load()


def _of_one_size(load: Callable[[Path], ClassificationData]) -> Load:
    return lambda folder, image_size: load(folder)


DATA_SETS: dict[str, DataSet] = {
    "mnist1d": DataSet((40,), 10, 4000, _without_files(generated.mnist1d)),
    "blobs": DataSet((2,), 3, 300, _without_files(packaged.blobs)),
    "mnist_sample": DataSet((1, 28, 28), 10, 4000, _without_files(packaged.mnist_sample)),
    "digits": DataSet((1, 8, 8), 10, 1397, _without_files(packaged.digits)),
    "mnist": DataSet((1, 28, 28), 10, 60_000, _of_one_size(files.mnist), True),
    "cifar10": DataSet((3, 32, 32), 10, 50_000, _of_one_size(files.cifar10), True),
    "cifar100": DataSet((3, 32, 32), 20, 50_000, _of_one_size(files.cifar100), True),
    "image_folder": DataSet((3, 0, 0), None, None, files.image_folder, True),
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


def load_data(
    name: str,
    *,
    folder: str,
    train_size: int,
    classes: int,
    image_size: int = 0,
    flat: bool = False,
    label_noise: float = 0.0,
    label_noise_kind: str = "redraw",
    seed: int = 0,
) -> ClassificationData:
    """Load a training and test set: subset, averaged down, with label noise.

    Args:
        name: in `DATA_SETS`.
        folder: of the files, where the user supplies them.
        train_size: the first so many training samples are used.
        classes: labels are from 0 to classes - 1.
        image_size: images are averaged down to it.
        flat: whether samples are vectors, also those of images.
        label_noise: fraction of the training labels that are disturbed.
        label_noise_kind: how, see `with_label_noise`.
        seed: of the label noise.

    Raises:
        ArgumentError: files are missing or damaged, or do not fit the other arguments.
    """
    full = DATA_SETS[name].load(Path(folder).expanduser(), image_size)
    if train_size > len(full.y_train):
        raise ArgumentError(
            f"train_size = {train_size}: there are only {len(full.y_train)} samples"
        )
    true = full.y_train[:train_size].clone()
    if int(torch.cat([true, full.y_test]).max()) >= classes:
        raise ArgumentError(f"classes = {classes}: the data has more")

    def prepared(x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = averaged_down(x, image_size)
        return x.flatten(1).contiguous() if flat else x.contiguous()

    return ClassificationData(
        x_train=prepared(full.x_train[:train_size]),
        y_train=with_label_noise(true, label_noise, seed, classes, label_noise_kind),
        x_test=prepared(full.x_test),
        y_test=full.y_test,
        y_train_true=true,
    )
