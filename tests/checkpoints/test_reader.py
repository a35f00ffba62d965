from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lipfast.checkpoints import Checkpoint, find_checkpoints, read_checkpoint
from lipfast.errors import CheckpointError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def read(path: Path) -> Checkpoint:
    (file,) = find_checkpoints(path)
    return read_checkpoint(file)


def assert_same(state_dict, expected=None):
    expected = STATE if expected is None else expected
    assert list(state_dict) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state_dict[name], tensor)


def test_safetensors(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", metadata={"step": "5", "width": "2"})
    checkpoint = read(tmp_path / "a.safetensors")
    assert {k: v.tolist() for k, v in checkpoint.state_dict.items()} == {
        k: v.tolist() for k, v in STATE.items()
    }
    assert checkpoint.metadata.step == 5
    assert checkpoint.metadata.values == {"step": 5, "width": 2}


def test_large_files_are_read_the_same_way(tmp_path):
    state = {"weight": torch.randn(600, 600, generator=torch.Generator().manual_seed(0))}
    save_file(state, tmp_path / "a.safetensors", metadata={"step": "1"})
    torch.save({"state_dict": state, "step": 1}, tmp_path / "b.pt")
    torch.save(state, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "b.pt", "c.pt"):
        assert_same(read(tmp_path / name).state_dict, state)
    assert read(tmp_path / "a.safetensors").metadata.step == 1
    assert read(tmp_path / "b.pt").metadata.step == 1


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict"])
def test_torch_files_and_their_wrappers(tmp_path, key):
    content = dict(STATE) if key is None else {key: STATE, "optimizer": {"lr": torch.ones(())}}
    extra = {
        "epoch": 3,
        "loss": 0.5,
        "name": "toy",
        "huge": 10**500,
        "hyper_parameters": {"width": 2, "nested": {"ignored": 1}},
    }
    if key is not None:
        extra["global_step"] = torch.tensor(9)
    torch.save({**content, **extra}, tmp_path / "a.pt")
    checkpoint = read(tmp_path / "a.pt")
    assert_same(checkpoint.state_dict)
    expected = {"epoch": 3, "loss": 0.5, "name": "toy", "width": 2}
    if key is not None:
        expected["global_step"] = 9
    assert checkpoint.metadata.values == expected
    assert checkpoint.metadata.step == (9 if key else None)


def test_the_level_of_compiled_modules_is_removed(tmp_path):
    names = ["_orig_mod.0.weight", "encoder._orig_mod.weight", "my_orig_mod.weight"]
    torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pt")
    expected = ["0.weight", "encoder.weight", "my_orig_mod.weight"]
    assert list(read(tmp_path / "a.pt").state_dict) == expected


def test_parameters_arrive_without_gradients(tmp_path):
    torch.save(dict(nn.Linear(2, 2).named_parameters()), tmp_path / "a.pt")
    assert not any(t.requires_grad for t in read(tmp_path / "a.pt").state_dict.values())


def test_memory_url(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    memory = fsspec.filesystem("memory")
    for name in ("a.safetensors", "b.pt"):
        memory.pipe(f"/lipfast-reader/{name}", (tmp_path / name).read_bytes())
    try:
        for file in find_checkpoints("memory://lipfast-reader"):
            assert sorted(read_checkpoint(file).state_dict) == sorted(STATE)
        (first, _) = find_checkpoints("memory://lipfast-reader")
    finally:
        memory.rm("/lipfast-reader", recursive=True)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no such file"):
        read_checkpoint(first)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, 0.99])
def test_truncated(tmp_path, name, keep):
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(CheckpointError, match=rf"{name}: truncated, or not .* again") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_truncated_large_safetensors(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(600, 600)}, path)
    path.write_bytes(path.read_bytes()[:-100_000])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: truncated"):
        read(path)


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, json.dumps({"w": 1}).encode()],
    ids=["list", "cut", "bytes", "deep", "number"],
)
def test_malformed_safetensors_headers(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read(path)


def test_vanished(tmp_path):
    path = tmp_path / "a.pt"
    torch.save(STATE, path)
    (file,) = find_checkpoints(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.pt: no such file"):
        read_checkpoint(file)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda o, p: p.write_bytes(pickle.dumps(o, 2)),
        lambda o, p: p.write_bytes(pickle.dumps(o, 4)),
    ],
    ids=["torch.save", "protocol 2", "protocol 4"],
)
def test_malicious_pickles_run_nothing(tmp_path, write):
    proof = tmp_path / "proof"
    path = tmp_path / "a.pt"
    write({"weight": torch.ones(1), "payload": Payload(proof)}, path)
    with pytest.raises(CheckpointError, match=r"a\.pt: .*") as caught:
        read(path)
    assert not proof.exists()
    assert "weights_only" not in str(caught.value)
    torch.save({"payload": Payload(proof)}, path)
    with pytest.raises(CheckpointError, match=r"holds more than weights \(\w*\.mkdir\); nothing"):
        read(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the payload works: only the reader kept it from running
    assert proof.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickles_are_called_so(tmp_path, protocol):
    path, proof = tmp_path / "a.pt", tmp_path / "proof"
    path.write_bytes(pickle.dumps({"payload": Payload(proof), "weight": torch.ones(1)}, protocol))
    with pytest.raises(CheckpointError, match=r"more than weights \(\w*\.mkdir\); nothing"):
        read(path)
    path.write_bytes(pickle.dumps({"weight": [1.0, 2.0]}, protocol))
    with pytest.raises(CheckpointError, match=r"more than weights \(a plain pickle\); nothing"):
        read(path)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor; expected a state dict"),
        ([torch.ones(2)], "holds a list; expected a state dict"),
        ({}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors"),
    ],
)
def test_other_contents(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "a.pt")


def test_empty_safetensors_and_foreign_zip(tmp_path):
    save_file({}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read(tmp_path / "a.safetensors")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("readme.txt", "not weights")
    with pytest.raises(CheckpointError, match=r"b\.pt: truncated, or not weights"):
        read(tmp_path / "b.pt")


def test_damaged_bytes_never_escape_as_other_errors(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    good = (tmp_path / "a.pt").read_bytes()
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(60):
        data = bytearray(good)
        for position in torch.randint(len(good), (8,), generator=generator).tolist():
            data[position] ^= 0xFF
        (tmp_path / "a.pt").write_bytes(bytes(data))
        try:
            read(tmp_path / "a.pt")
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert "refused" in outcomes
