"""Large files: what is wanted is read at once, whatever happens to the file later."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from lipfast.checkpoints import CheckpointFile, find_checkpoints, read_checkpoint
from lipfast.checkpoints.file_memory import FileMemory
from lipfast.errors import CheckpointError, UnreachableError

FILE = CheckpointFile("file:///a.pt", "/a.pt", 1, 0.0, "a")
STATE = {
    "w": torch.arange(1 << 19).float().reshape(1 << 10, -1),
    "b": torch.arange(7, dtype=torch.float64),
    "h": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "count": torch.tensor(5),
}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "old.pt"])
def test_a_file_that_is_cut_off_after_it_was_read(tmp_path, name):
    path = tmp_path / name
    if name == "a.safetensors":
        save_file(STATE, path, {"step": "3"})
    else:
        new = name == "a.pt"
        torch.save({"net": STATE, "step": 3}, path, _use_new_zipfile_serialization=new)
    checkpoint = read_checkpoint(*find_checkpoints(path))
    os.truncate(path, 0)  # numbers that were mapped would end this process now
    assert checkpoint.state_dict.keys() == STATE.keys()
    for key, value in checkpoint.state_dict.items():
        assert value.dtype == STATE[key].dtype
        assert torch.equal(value, STATE[key])
    assert checkpoint.metadata.step == 3


def test_views_and_single_numbers_of_large_files(tmp_path):
    w = STATE["w"]
    content = {"t": w.t(), "part": w[3:5, ::2], "flat": w.reshape(-1)[7:9], "again": w}
    beside = {"best": w[1, 2], "step": torch.tensor(9)}
    torch.save({"model": content, **beside}, tmp_path / "a.pt")
    checkpoint = read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))
    assert all(torch.equal(checkpoint.state_dict[name], one) for name, one in content.items())
    assert checkpoint.metadata.values == {"best": w[1, 2].item(), "step": 9}


def test_states_of_optimizers_are_not_read(tmp_path, monkeypatch):
    states = {"state": {0: {"exp_avg": torch.ones(3 << 20)}}, "param_groups": []}
    torch.save({"model": STATE, "optimizer": states}, tmp_path / "a.pt")
    read, lengths = FileMemory.read, []

    def counted(memory: FileMemory, start: int, length: int) -> None:
        lengths.append(length)
        read(memory, start, length)

    monkeypatch.setattr(FileMemory, "read", counted)
    found = read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))
    assert torch.equal(found.state_dict["w"], STATE["w"])
    assert 2 << 20 < sum(lengths) < 3 << 20


def test_what_changes_while_it_is_read_is_tried_again_later(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\1" * 5000)
    with path.open("rb") as stream:
        memory = FileMemory(FILE, stream)
        memory.read(4096, 10)
        assert memory.buffer[4090:4110] == b"\0" * 6 + b"\1" * 10 + b"\0" * 4
        memory.require_unchanged(str(path))
        path.rename(tmp_path / "old")
        path.write_bytes(b"\1" * 5000)
        memory.require_unchanged()
        with pytest.raises(UnreachableError, match="it was written to while it was read"):
            memory.require_unchanged(str(path))
        (tmp_path / "old").rename(path)
        os.truncate(path, 4200)
        with pytest.raises(UnreachableError, match=r"a\.pt: it was written to while it was read"):
            memory.require_unchanged()
        with pytest.raises(CheckpointError, match=r"a\.pt: truncated while it was read"):
            memory.read(4190, 100)
    os.truncate(path, 0)
    with path.open("rb") as stream, pytest.raises(CheckpointError, match="it is empty"):
        FileMemory(FILE, stream)
