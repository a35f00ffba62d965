from __future__ import annotations

import pickle
import random
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.scoring import data
from lipfast.scoring.data import load_data, register_data

X = torch.arange(12.0).reshape(3, 4)


def test_every_kind_of_file(tmp_path):
    save_file({"x": X, "x_train": X + 1}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", x=X.numpy(), x_train=X.numpy() + 1)
    torch.save({"x": X, "x_train": X + 1, "note": "text"}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.npz", "a.pt"):
        assert torch.equal(load_data(tmp_path / name).x, X)
        assert torch.equal(load_data(f"{tmp_path / name}:x_train").x, X + 1)
        with pytest.raises(ArgumentError, match="no key 'y'; it has x, x_train"):
            load_data(f"{tmp_path / name}:y")
    np.save(tmp_path / "a.npy", X.numpy())
    torch.save(X, tmp_path / "b.pt")
    for name in ("a.npy", "b.pt"):
        assert torch.equal(load_data(tmp_path / name).x, X)
        with pytest.raises(ArgumentError, match="holds one tensor: drop the key ':x'"):
            load_data(f"{tmp_path / name}:x")


def test_default_key_is_missing(tmp_path):
    save_file({"images": X}, tmp_path / "a.safetensors")
    with pytest.raises(ArgumentError, match="no key 'x'; it has images"):
        load_data(tmp_path / "a.safetensors")


def test_tensors_and_arrays():
    assert torch.equal(load_data(X).x, X)
    assert load_data(X.numpy().astype(">f8")).x.dtype == torch.float64
    assert load_data(X.to(torch.bfloat16)).x.dtype == torch.float32
    assert load_data(X.t()).x.is_contiguous()


def test_digest_covers_values_shape_and_dtype():
    digests = {load_data(x).digest for x in (X, X + 1, X.reshape(4, 3), X.double(), X[:2])}
    assert len(digests) == 5
    assert load_data(X.clone()).digest == load_data(X.numpy()).digest


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.long(), "dtype int64, expected floating-point"),
        (X > 0, "dtype bool, expected floating-point"),
        (X.to(torch.complex64), "dtype complex64, expected floating-point"),
        (X[0], r"shape \(4,\), expected \(samples, ...\)"),
        (X[:0], r"shape \(0, 4\): no samples"),
        (np.array([["a"]]), "expected floating-point"),
    ],
)
def test_wrong_shape_or_dtype(x, message):
    with pytest.raises(ArgumentError, match=message):
        load_data(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_samples_are_named(bad):
    x = X.clone()
    x[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"1 of 3 samples .* sample 1"):
        load_data(x)


def test_missing_file_and_unknown_kind(tmp_path):
    with pytest.raises(ArgumentError, match=r"no data at 'missing\.npy': .*mnist1d:train"):
        load_data("missing.npy")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ArgumentError, match=r"unknown kind '\.csv'"):
        load_data(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz", "a.npy", "a.pt"])
def test_damaged_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"not a tensor")
    with pytest.raises(ArgumentError, match=f"data file '.*{name}': damaged, or not plain"):
        load_data(tmp_path / name)


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ArgumentError, match="damaged, or not plain"):
        load_data(tmp_path / "a.npy")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(X.numpy(), 2))
    with pytest.raises(ArgumentError, match="damaged, or not plain"):
        load_data(tmp_path / "b.pt")


@pytest.mark.parametrize("x", [X.to_sparse(), X.to(torch.complex64).conj().imag])
def test_tensors_of_kinds_that_are_not_read(tmp_path, x):
    for content in (x, {"x": x}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ArgumentError, match=r"holds a (sparse tensor|tensor that is negated)"):
            load_data(tmp_path / "a.pt")


class Sized:
    def __reduce__(self):
        return bytearray, (1 << 32,)


class Beside:
    pass


def test_nothing_beside_the_samples_is_made_or_takes_memory(tmp_path):
    for legacy in (False, True):
        kind = {"_use_new_zipfile_serialization": not legacy}
        torch.save({"x": X, "y": Beside()}, tmp_path / "a.pt", **kind)
        assert torch.equal(load_data(tmp_path / "a.pt").x, X)
        torch.save({"x": X, "y": Sized()}, tmp_path / "b.pt", **kind)
        with pytest.raises(ArgumentError, match=r"damaged, .*: it makes byte arrays"):
            load_data(tmp_path / "b.pt")
    torch.save(Beside(), tmp_path / "c.pt")
    with pytest.raises(ArgumentError, match=r"holds .*Beside, expected a tensor or a dict"):
        load_data(tmp_path / "c.pt")


def test_mnist1d_leaves_the_global_generators_alone():
    pytest.importorskip("mnist1d")
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    train, test = load_data("mnist1d:train"), load_data("mnist1d:test")
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (train.x.shape, test.x.shape) == ((4000, 40), (1000, 40))
    assert train.x.dtype == torch.float32
    assert load_data("mnist1d:test").digest == test.digest
    with pytest.raises(ArgumentError, match="splits train and test, not 'validation'"):
        load_data("mnist1d:validation")


def test_missing_package_names_the_extra(monkeypatch):
    data._generate_mnist1d.cache_clear()
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ArgumentError, match=r"pip install 'lipfast\[experiments\]'"):
        load_data("mnist1d:train")


def test_a_name_is_registered_once():
    with pytest.raises(ArgumentError, match="'mnist1d' is registered already"):
        register_data("mnist1d")(lambda split: X)


def test_data_of_the_wrong_type():
    with pytest.raises(ArgumentError, match="not list"):
        load_data([[1.0, 2.0]])
