from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.data.files import cifar10, cifar100, image_folder, mnist, read_idx
from experiments.data.packaged import mnist_sample
from experiments.settings import parse_settings
from experiments.task import load_sweep_data
from lipfast.errors import ArgumentError


def _idx(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _mnist_folder(folder: Path, compress: bool = False) -> None:
    for part, count in (("train", 6), ("t10k", 4)):
        images = np.arange(count * 784).reshape(count, 28, 28) % 256
        for name, array in (
            (f"{part}-images-idx3-ubyte", images),
            (f"{part}-labels-idx1-ubyte", np.arange(count)),
        ):
            content = _idx(array)
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [False, True])
def test_mnist(tmp_path: Path, compress: bool) -> None:
    _mnist_folder(tmp_path, compress)
    data = mnist(tmp_path)
    assert data.x_train.shape == (6, 1, 28, 28)
    assert data.y_test.tolist() == [0, 1, 2, 3]
    assert data.x_train[0, 0, 0, 5].item() == np.float32(5 / 255)
    assert data.x_train.max() == 1


def test_damaged_idx_files(tmp_path: Path) -> None:
    path = tmp_path / "images"
    for content, message in (
        (b"", "not an IDX file"),
        (b"\0\0\x0d\1" + struct.pack(">I", 0), "not an IDX file"),
        (b"\0\0\x08\xff", "not an IDX file"),
        (_idx(np.zeros((2, 3)))[:-1], "5 bytes of data, its header says 6"),
        (b"\0\0\x08\2" + struct.pack(">2I", 2**31, 2**31), "its header says"),
    ):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=message):
            read_idx(path)
    path.with_suffix(".gz").write_bytes(b"no gzip")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_idx(path.with_suffix(".gz"))


@pytest.mark.parametrize(
    ("read", "what"),
    [
        (mnist, "train-images-idx3-ubyte.*put the files of MNIST"),
        (cifar10, "data_batch_1.bin.*put the files of the binary version of CIFAR-10"),
        (cifar100, "train.bin.*put the files of the binary version of CIFAR-100"),
        (lambda folder: image_folder(folder, 8), "put images into .*train/<class>"),
    ],
)
def test_a_missing_folder_says_what_to_put_where(
    tmp_path: Path, read: Callable[[Path], object], what: str
) -> None:
    with pytest.raises(ArgumentError, match=what):
        read(tmp_path / "nowhere")


def test_images_without_their_labels(tmp_path: Path) -> None:
    _mnist_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(_idx(np.arange(5)))
    with pytest.raises(ArgumentError, match="do not belong together"):
        mnist(tmp_path)


def test_cifar(tmp_path: Path) -> None:
    pixels = (np.arange(3072) % 251).astype(np.uint8)
    for i in range(1, 6):
        record = np.concatenate([[i], pixels]).astype(np.uint8).tobytes()
        (tmp_path / f"data_batch_{i}.bin").write_bytes(record * 2)
    (tmp_path / "test_batch.bin").write_bytes(np.concatenate([[9], pixels]).astype(np.uint8))
    data = cifar10(tmp_path)
    assert data.y_train.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.x_test.shape == (1, 3, 32, 32)
    assert data.x_test[0, 1, 0, 3].item() == np.float32(pixels[1024 + 3] / 255)
    hundred = np.concatenate([[19, 88], pixels]).astype(np.uint8)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(hundred)
    assert cifar100(tmp_path).y_train.tolist() == [19]
    assert cifar100(tmp_path, coarse=False).y_train.tolist() == [88]
    (tmp_path / "train.bin").write_bytes(hundred[:-1])
    with pytest.raises(ArgumentError, match="binary version of CIFAR is needed"):
        cifar100(tmp_path)


def test_image_folder(tmp_path: Path) -> None:
    for part, count in (("train", 2), ("val", 1)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                colour = (255 * label, 0, 0)
                Image.new("RGB", (20, 12), colour).save(tmp_path / part / name / f"{i}.png")
    data = image_folder(tmp_path, 4)
    assert data.x_train.shape == (4, 3, 4, 4)
    assert data.y_train.tolist() == [0, 0, 1, 1]
    assert data.x_test[:, 0].flatten(1).mean(1).tolist() == [0, 1]
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(ArgumentError, match=r"0\.png: not an image"):
        image_folder(tmp_path, 4)


BASIC: dict[str, Any] = {"widths": [2], "seeds": [0], "steps": 1, "lr": 0.1, "checkpoints": 2}


def test_images_are_averaged_down_and_flat_where_the_model_wants_it() -> None:
    common = {**BASIC, "data": "mnist_sample", "image_size": 14, "train_size": 50}
    images = load_sweep_data(parse_settings("s", "t", {**common, "model": "cnn"}))
    flat = load_sweep_data(parse_settings("s", "t", common))
    assert images.x_train.shape == (50, 1, 14, 14)
    assert torch.equal(images.x_train.flatten(1), flat.x_train)
    whole = mnist_sample()
    expected = whole.x_train[7, 0, 12:14, 14:16].mean()
    torch.testing.assert_close(images.x_train[7, 0, 6, 7], expected)


def test_data_that_does_not_fit_the_configuration(tmp_path: Path) -> None:
    _mnist_folder(tmp_path)
    config = parse_settings(
        "s",
        "t",
        {**BASIC, "data": "mnist", "data_folder": str(tmp_path), "train_size": 100},
    )
    with pytest.raises(ArgumentError, match="train_size = 100: there are only 6"):
        load_sweep_data(config)
