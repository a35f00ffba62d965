"""Folders as Lightning, the Hugging Face Trainer and others leave them."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.errors import CheckpointError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def hugging_face(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_file(STATE, folder / "model.safetensors", {"format": "pt"})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        torch.save({"state": {}}, folder / name)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    state = {"global_step": 500, "epoch": 2.5, "log_history": [{"loss": 9.0}, {"eval_loss": 0.25}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    (folder / "config.json").write_text(json.dumps({"hidden_size": 3, "task": {"skipped": 1}}))
    return folder


def test_hugging_face_trainer(tmp_path):
    hugging_face(tmp_path / "bert" / "checkpoint-500")
    (file,) = find_checkpoints(tmp_path)
    metadata = read_checkpoint(file).metadata
    assert (metadata.run, metadata.step, metadata.epoch) == ("bert", 500, 2.5)
    assert metadata.values["eval_loss"] == 0.25
    assert metadata.values["hidden_size"] == 3


def test_lightning(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    content = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {f"model.{name}": value for name, value in STATE.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 2, "lr": 1e-3},
    }
    torch.save(content, folder / "epoch=1-step=20.ckpt")
    (file,) = find_checkpoints(tmp_path)
    checkpoint = read_checkpoint(file)
    assert sorted(checkpoint.state_dict) == ["model.0.bias", "model.0.weight"]
    assert (checkpoint.metadata.run, checkpoint.metadata.step) == ("version_0", 20)
    assert checkpoint.metadata.values["lr"] == 1e-3


@pytest.mark.parametrize("keys", [["model", "state_dict"], ["state_dict", "module"], ["network"]])
def test_nested_state_dicts(tmp_path, keys):
    content = dict(STATE)
    for depth, key in enumerate(reversed(keys)):
        content = {key: content, "step": depth}
    torch.save(content, tmp_path / "a.pt")
    checkpoint = read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))
    assert list(checkpoint.state_dict) == list(STATE)
    assert checkpoint.metadata.step == len(keys) - 1  # the outermost


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in STATE.items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    for file in find_checkpoints(tmp_path):
        read = read_checkpoint(file).state_dict
        assert all(read[name].dtype == dtype for name in state)
        assert all(torch.equal(read[name], state[name]) for name in state)


# Sidecars


def test_sidecars_in_order_of_precedence(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors", {"step": "1"})
    (tmp_path / "a.json").write_text('{"step": 2, "lr": 0.5, "config": {"width": 7}}')
    (tmp_path / "metadata.json").write_text('{"lr": 9, "seed": 3, "tags": ["x"]}')
    values = read_checkpoint(*find_checkpoints(tmp_path / "a.safetensors")).metadata.values
    assert values == {"step": 1, "lr": 0.5, "width": 7, "seed": 3}


def test_sidecars_of_remote_checkpoints(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")
    memory = fsspec.filesystem("memory")
    memory.pipe("/lipfast-side/a.safetensors", (tmp_path / "a.safetensors").read_bytes())
    memory.pipe("/lipfast-side/a.json", b'{"step": 4}')
    try:
        for archive in ("memory://lipfast-side", "memory://lipfast-side/a.safetensors"):
            assert read_checkpoint(*find_checkpoints(archive)).metadata.step == 4
    finally:
        memory.rm("/lipfast-side", recursive=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"[1]", "holds no JSON object"), (b" " * (9 << 20), "longer than")],
    ids=["cut", "list", "long"],
)
def test_malformed_sidecars(tmp_path, content, message):
    save_file(STATE, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=rf"a\.safetensors: .*'a\.json'.* {message}|{message}"
    ):
        read_checkpoint(*find_checkpoints(tmp_path))


# Shards


def sharded(folder: Path, places: dict[str, str] | None = None) -> Path:
    save_file({"0.weight": STATE["0.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"0.bias": STATE["0.bias"]}, folder / "model-00002-of-00002.safetensors")
    places = places or {
        "0.weight": "model-00001-of-00002.safetensors",
        "0.bias": "model-00002-of-00002.safetensors",
    }
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": places}))
    return index


def test_shards_are_one_checkpoint(tmp_path):
    index = sharded(tmp_path)
    (file,) = find_checkpoints(tmp_path)
    assert file.uri == f"file://{index}"
    assert file.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    checkpoint = read_checkpoint(file)
    assert all(torch.equal(checkpoint.state_dict[name], STATE[name]) for name in STATE)
    assert checkpoint.metadata.values == {"total_size": 32}


def test_shards_elsewhere(tmp_path):
    sharded(tmp_path)
    memory = fsspec.filesystem("memory")
    for path in tmp_path.iterdir():
        memory.pipe(f"/lipfast-shards/{path.name}", path.read_bytes())
    try:
        (file,) = find_checkpoints("memory://lipfast-shards")
        assert sorted(read_checkpoint(file).state_dict) == sorted(STATE)
    finally:
        memory.rm("/lipfast-shards", recursive=True)


def test_old_shards_of_torch_save(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model-00001-of-00001.bin")
    places = dict.fromkeys(STATE, "pytorch_model-00001-of-00001.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert list(read_checkpoint(*find_checkpoints(tmp_path)).state_dict) == list(STATE)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"0.weight": "../secret.safetensors"}, "has a path in its name"),
        ({"0.weight": "/etc/secret.safetensors"}, "has a path in its name"),
        ({"0.weight": "..\\secret.safetensors"}, "has a path in its name"),
        ({"0.weight": "missing.safetensors"}, "shard 'missing.safetensors' is missing"),
        ({"0.other": "model-00001-of-00002.safetensors"}, "lacks '0.other'"),
        ({"0.weight": 3}, "lies in 3, which is no shard"),
        ({"0.weight": "passwd"}, "which is no shard"),
        ({f"{i}": f"{i}.safetensors" for i in range(5000)}, "5000 shards"),
        ({"0.weight": "truncated.safetensors"}, "shard 'truncated.safetensors': truncated"),
    ],
)
def test_hostile_indexes(tmp_path, places, message):
    folder = tmp_path / "inner"
    folder.mkdir()
    save_file(STATE, tmp_path / "secret.safetensors")
    index = sharded(folder, places)
    (folder / "truncated.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(*find_checkpoints(index))


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"weight_map": []}', b"[" * 100_000])
def test_what_is_no_index(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not JSON|no index of shards"):
        read_checkpoint(*find_checkpoints(tmp_path))
