"""Files that are something else than their names say: what they are, in the error."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save, save_file

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.checkpoints.content import HEAD, foreign, is_safetensors, is_tar, is_torch
from lipfast.errors import CheckpointError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"content")
    return stream.getvalue()


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.ones(3))
    return stream.getvalue()


def array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(3))
    return stream.getvalue()


def exported() -> bytes:
    stream = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), stream)
    return stream.getvalue()


def tar(mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("a.pt"), io.BytesIO())
    return stream.getvalue()


def torch_bytes(**options) -> bytes:
    stream = io.BytesIO()
    torch.save(STATE, stream, **options)
    return stream.getvalue()


FOREIGN = [
    (LFS, "a pointer of Git LFS, .*git lfs pull"),
    (PAGE, r"a web page \(HTML\) .*Download it again"),
    (b"\xef\xbb\xbf<HTML lang=en>" + PAGE, r"a web page \(HTML\)"),
    (gzip.compress(PAGE), r"compressed with gzip, and inside a web page"),
    (gzip.compress(torch_bytes()), "compressed with gzip. Unpack it"),
    (XML, "an XML text"),
    (b"<Error><Code>NoSuchKey</Code></Error>", "an XML text"),
    (json.dumps({"error": "Repository not found"}).encode(), "a JSON text"),
    (b"Entry not found", "truncated, or not weights: a text that begins with 'Entry not found'"),
    (
        b"learning rate: 0.1\nwidth: 64\n" * 50,
        "truncated, .*: a text that begins with 'learning rate: 0.1'",
    ),
    (b"\0" * 3000, "truncated, or not .* its 3000 bytes begin with zeros only"),
    (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file, as Keras"),
    (b"\x08\x07\x12\x07pytorch\x1a\x052.4.0:" + b"\x80\xff" * 50, "a model in ONNX"),
    (b"\x1c\0\0\0TFL3" + b"\0\x80" * 50, "a model of TensorFlow Lite"),
    (b"GGUF\3\0\0\0" + b"\0\x90" * 50, "a GGUF file"),
    (array(), "an array of numpy"),
    (tar(), "a tar archive. Rename it to .tar"),
    (tar("w:gz"), "a tar archive"),
    (b"\x89PNG\r\n\x1a\n\0\0", "a picture"),
    (b"%PDF-1.4\x80", "a PDF document"),
    (b"\x7fELF\2\1\1\0\0", r"a program or a library"),
]


@pytest.mark.parametrize(("content", "message"), FOREIGN, ids=range(len(FOREIGN)))
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.ckpt", "mp_rank_00_model_states.pt"])
def test_what_a_file_is(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
        read_checkpoint(*find_checkpoints(tmp_path / name))


@pytest.mark.filterwarnings("ignore")
def test_what_the_parts_of_a_checkpoint_are(tmp_path):
    shards, folder = tmp_path / "shards", tmp_path / "folder"
    for one in (shards, folder):
        one.mkdir()
    for suffix in ("bin", "safetensors"):
        shard = f"model-00001-of-00001.{suffix}"
        index = shards / f"model.{suffix}.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": shard}}))
        (shards / shard).write_bytes(LFS)
        with pytest.raises(CheckpointError, match=rf"its shard '{shard}': a pointer of Git LFS"):
            read_checkpoint(*find_checkpoints(index))
    dcp.save(STATE, checkpoint_id=str(folder))
    (folder / "__0_0.distcp").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"its file '__0_0\.distcp' is a pointer of Git LFS"):
        read_checkpoint(*find_checkpoints(folder))
    (folder / ".metadata").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"\.metadata: a pointer of Git LFS"):
        read_checkpoint(*find_checkpoints(folder))


def test_a_misnamed_file_of_deepspeed(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    save_file(STATE, path)
    assert read_checkpoint(*find_checkpoints(path)).state_dict.keys() == STATE.keys()


def test_what_is_packed_in_itself_is_packed(tmp_path):
    (tmp_path / "a.pt").write_bytes(gzip.compress(gzip.compress(PAGE)))
    with pytest.raises(CheckpointError, match=r"a\.pt: compressed with gzip\. Unpack it"):
        read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))


def test_what_a_large_file_is(tmp_path):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(PAGE * 40_000)
        with pytest.raises(CheckpointError, match=rf"{name}: a web page \(HTML\)"):
            read_checkpoint(*find_checkpoints(tmp_path / name))


def test_what_a_remote_file_is():
    memory = fsspec.filesystem("memory")
    memory.pipe("/lipfast-content/a.pt", LFS)
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt: a pointer of Git LFS"):
            read_checkpoint(*find_checkpoints("memory://lipfast-content"))
    finally:
        memory.rm("/lipfast-content", recursive=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (arrays, r"arrays of numpy \(\.npz\)"),
        (exported, r"a program of torch\.export\. Pass it as the architecture"),
        (lambda: zipped("metadata.json", "model.weights.h5"), "a model of Keras"),
        (lambda: zipped("[Content_Types].xml"), "an office document"),
        (lambda: zipped("runs/a.pt"), r"a zip archive .*Rename it to \.zip"),
    ],
)
def test_what_a_zip_archive_is(tmp_path, make, message):
    (tmp_path / "a.pt").write_bytes(make())
    with pytest.raises(CheckpointError, match=rf"a\.pt: {message}"):
        read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off(tmp_path, keep):
    for name, data in (("a.pt", torch_bytes()), ("a.safetensors", save(STATE))):
        (tmp_path / name).write_bytes(data[: int(keep * len(data))])
        with pytest.raises(CheckpointError, match=rf"{name}: truncated, or not "):
            read_checkpoint(*find_checkpoints(tmp_path / name))
    (tmp_path / "a.pt").write_bytes(torch_bytes()[:-100])
    with pytest.raises(CheckpointError, match="its end is missing or damaged"):
        read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))


def test_misnamed_weights_are_read(tmp_path):
    save_file(STATE, tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.safetensors")
    torch.save(STATE, tmp_path / "c.safetensors", _use_new_zipfile_serialization=False)
    for file in find_checkpoints(tmp_path):
        read = read_checkpoint(file).state_dict
        assert {name: value.tolist() for name, value in read.items()} == {
            name: value.tolist() for name, value in STATE.items()
        }


def test_weights_are_taken_for_nothing_else():
    kinds = {"torch": (True, False), "legacy": (True, False), "safetensors": (False, True)}
    contents = {
        "torch": torch_bytes(),
        "legacy": torch_bytes(_use_new_zipfile_serialization=False),
        "safetensors": save(STATE, {"format": "pt"}),
    }
    for kind, content in contents.items():
        head = content[:HEAD]
        assert foreign(head, len(content)) is None
        assert (is_torch(head), is_safetensors(head)) == kinds[kind]
        assert not is_tar(head)


def test_hostile_pickles_are_not_called_texts(tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(CheckpointError, match=r"more than weights \(os\.system\); nothing"):
        read_checkpoint(*find_checkpoints(tmp_path / "a.pt"))
