"""Readers of data sets that a user has: MNIST (IDX), CIFAR (binary version), folders of images."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from experiments.data.dataset import ClassificationData
from lipfast.errors import ArgumentError

_IDX_TYPES = {8: np.dtype(np.uint8)}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"}
_CIFAR_PIXELS = 3 * 32 * 32


def _found(folder: Path, names: tuple[str, ...], what: str) -> list[Path]:
    """Return the files of a folder, each possibly gzipped or in a subfolder of the usual name."""
    paths: list[Path] = []
    missing: list[str] = []
    for name in names:
        hits = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        paths += hits[:1]
        missing += [] if hits else [name]
    if missing:
        raise ArgumentError(
            f"data_folder = {str(folder)!r}: {', '.join(missing)} not there; put the files of "
            f"{what} into this folder ({', '.join(names)}; may be gzipped)"
        )
    return paths


def _bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise ArgumentError(f"{path}: cannot be read: {error}; fetch the file again") from None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a file of the IDX format (LeCun, Cortes and Burges): unsigned bytes of any shape.

    Two zero bytes, the type (8), the number of dimensions, the sizes as big-endian 32-bit integers,
    the data.

    Raises:
        ArgumentError: the file is no IDX file of bytes, or it is cut off.
    """
    content = _bytes(path)
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if content[:2] != b"\0\0" or len(content) < start or content[2] not in _IDX_TYPES:
        raise ArgumentError(f"{path}: not an IDX file of unsigned bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, 4))
    if len(content) - start != math.prod(shape):
        raise ArgumentError(
            f"{path}: {len(content) - start} bytes of data, its header says {math.prod(shape)}; "
            "fetch the file again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def mnist(folder: Path) -> ClassificationData:
    """Read MNIST: images (1, 28, 28) in [0, 1].

    Raises:
        ArgumentError: a file is missing or damaged; the message says what to put where.
    """
    names = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    paths = _found(folder, names, "MNIST")
    arrays = [read_idx(path) for path in paths]
    for images, labels, path in (
        (arrays[0], arrays[1], paths[0]),
        (arrays[2], arrays[3], paths[2]),
    ):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ArgumentError(
                f"{path}: images {images.shape} and labels {labels.shape} do not belong together"
            )
    x_train, y_train, x_test, y_test = (torch.from_numpy(array.copy()) for array in arrays)
    return ClassificationData(
        x_train=x_train.unsqueeze(1).float() / 255,
        y_train=y_train.long(),
        x_test=x_test.unsqueeze(1).float() / 255,
        y_test=y_test.long(),
    )


def _cifar_records(path: Path, label_bytes: int) -> tuple[Tensor, Tensor]:
    content = np.frombuffer(_bytes(path), np.uint8)
    record = label_bytes + _CIFAR_PIXELS
    if len(content) == 0 or len(content) % record:
        raise ArgumentError(
            f"{path}: {len(content)} bytes are no whole number of records of {record} bytes; "
            "the binary version of CIFAR is needed, not the Python one"
        )
    records = torch.from_numpy(content.copy()).reshape(-1, record)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).float() / 255
    return images, records[:, :label_bytes].long()


def cifar10(folder: Path) -> ClassificationData:
    """Read the binary version of CIFAR-10 (Krizhevsky, 2009): images (3, 32, 32) in [0, 1].

    Raises:
        ArgumentError: a file is missing or damaged; the message says what to put where.
    """
    names = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
    *train, test = _found(folder, names, "the binary version of CIFAR-10")
    parts = [_cifar_records(path, 1) for path in train]
    x_test, y_test = _cifar_records(test, 1)
    return ClassificationData(
        x_train=torch.cat([images for images, _ in parts]),
        y_train=torch.cat([labels[:, 0] for _, labels in parts]),
        x_test=x_test,
        y_test=y_test[:, 0],
    )


def cifar100(folder: Path, *, coarse: bool = True) -> ClassificationData:
    """Read the binary version of CIFAR-100, by default with its 20 superclasses.

    Args:
        folder: with `train.bin` and `test.bin`.
        coarse: the 20 superclasses; else the 100 classes.

    Raises:
        ArgumentError: a file is missing or damaged; the message says what to put where.
    """
    names = ("train.bin", "test.bin")
    paths = _found(folder, names, "the binary version of CIFAR-100")
    (x_train, y_train), (x_test, y_test) = (_cifar_records(path, 2) for path in paths)
    column = 0 if coarse else 1
    return ClassificationData(x_train, y_train[:, column], x_test, y_test[:, column])


def _images(folder: Path, classes: list[str], size: int) -> tuple[Tensor, Tensor]:
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415  # an extra: with matplotlib

    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).iterdir() if (folder / name).is_dir() else []):
            if path.suffix.lower() not in _IMAGE_SUFFIXES:
                continue
            try:
                with Image.open(path) as image:
                    side = min(image.size)
                    left, top = (image.width - side) // 2, (image.height - side) // 2
                    square = image.convert("RGB").crop((left, top, left + side, top + side))
                    pixels = np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
            except (OSError, UnidentifiedImageError) as error:
                raise ArgumentError(f"{path}: not an image: {error}") from None
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255)
            labels.append(label)
    if not images:
        raise ArgumentError(f"data_folder: {folder} holds no images in folders {classes[:3]}...")
    return torch.stack(images), torch.tensor(labels)


def image_folder(folder: Path, size: int) -> ClassificationData:
    """Read images from `train/<class>/*` and `val/<class>/*` (or `test`).

    They are (3, size, size) in [0, 1]. Each image is cropped to its middle square and
    resized. All images are held in memory.

    Raises:
        ArgumentError: a folder is missing (the message says what to put where), or a file is no
            image.
    """
    train = folder / "train"
    test = folder / "val" if (folder / "val").is_dir() else folder / "test"
    for part in (train, test):
        if not part.is_dir():
            raise ArgumentError(
                f"data_folder = {str(folder)!r}: {part} not there; put images into "
                f"{folder}/train/<class>/ and {folder}/val/<class>/"
            )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    if not classes:
        raise ArgumentError(f"data_folder: {train} has no folders, one per class, in it")
    x_train, y_train = _images(train, classes, size)
    x_test, y_test = _images(test, classes, size)
    return ClassificationData(x_train, y_train, x_test, y_test)
