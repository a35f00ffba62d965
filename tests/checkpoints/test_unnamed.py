"""Checkpoints whose names do not say so, and files that are none: taken by content, or counted."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.checkpoints.unnamed import by_ending
from lipfast.errors import ArchiveError, CheckpointError

STATE = {"0.weight": torch.arange(6.0).reshape(2, 3), "0.bias": torch.ones(2)}


def names(archive, aside: set[str] | None = None) -> list[str]:
    return [Path(file.path).name for file in find_checkpoints(archive, aside=aside)]


def assert_reads(archive) -> None:
    (file,) = find_checkpoints(archive)
    assert read_checkpoint(file).state_dict["0.weight"].tolist() == STATE["0.weight"].tolist()


@pytest.mark.parametrize("ending", [".pth.tar", ".pt.tar", ".pyth", ".th", ".PTH.TAR"])
@pytest.mark.parametrize("legacy", [False, True])
def test_endings_that_are_checkpoints(tmp_path, ending, legacy):
    path = tmp_path / f"epoch3{ending}"
    content = {"state_dict": STATE, "best": np.float64(0.5)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for archive in (path, tmp_path, str(tmp_path / "epoch*"), f"file://{path}"):
        assert_reads(archive)
    (tmp_path / "all.csv").write_text(f"path\n{path.name}\n")
    assert_reads(tmp_path / "all.csv")


@pytest.mark.parametrize(
    "name",
    [
        *("model.bin", "model.pkl", "a.pickle", "a.model", "a.weights", "a.params", "a.t7"),
        *("last", "ckpt.000100", "model.10", "a.best", "a.checkpoint", "a.tar", "a.zip", "a.dat"),
    ],
)
@pytest.mark.parametrize("how", ["zip", "legacy", "safetensors"])
def test_endings_that_say_nothing_are_taken_by_content(tmp_path, name, how):
    path = tmp_path / name
    if how == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=how == "zip")
    aside: set[str] = set()
    assert names(tmp_path, aside) == [name]
    assert not aside
    for archive in (path, tmp_path, str(tmp_path / name[:2]) + "*"):
        assert_reads(archive)
    (tmp_path / "b.pt").write_bytes(path.read_bytes())
    path.write_bytes(b"something else")
    assert names(tmp_path, aside) == ["b.pt"]
    assert aside == {str(path)}


def test_a_file_asked_for_by_name_may_have_any(tmp_path):
    torch.save(STATE, tmp_path / "a.weird")
    assert_reads(tmp_path / "a.weird")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps({k: v.numpy() for k, v in STATE.items()}))
    assert_reads(tmp_path / "b.pkl")
    aside: set[str] = set()
    torch.save(STATE, tmp_path / "c.pt")
    assert names(tmp_path, aside) == ["c.pt"]  # a plain pickle may be anything
    assert by_ending(aside) == {".weird": 1, ".pkl": 1}


def test_what_is_not_looked_at_is_counted(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    for name in ("b.h5", "c.h5", "d.onnx", "e.png", "f.npz", "g.pt2", "LICENSE", "deep/h.H5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    for name in ("config.json", "notes.md", "log.txt", ".hidden", "hparams.yaml"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("training_args.bin", "optimizer.bin", "random_states_0.pkl", "optimizer.pt"):
        torch.save({"state": {}}, tmp_path / name)
    aside: set[str] = set()
    assert names(tmp_path, aside) == ["a.pt"]
    expected = {".h5": 3, ".bin": 2, ".onnx": 1, ".png": 1, ".npz": 1, ".pt2": 1}
    assert by_ending(aside) == expected | {"no ending": 1, ".pkl": 1, ".pt": 1}
    glob: set[str] = set()
    assert names(str(tmp_path / "*.*"), glob) == ["a.pt", "optimizer.pt"]
    assert str(tmp_path / "b.h5") in glob


def test_shards_of_an_index_were_looked_at(tmp_path):
    save_file(STATE, tmp_path / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(STATE, "model-00001-of-00001.safetensors")
    index = str({"weight_map": places}).replace("'", '"')
    (tmp_path / "model.safetensors.index.json").write_text(index)
    aside: set[str] = set()
    assert names(tmp_path, aside) == ["model.safetensors.index.json"]
    assert not aside


def test_a_folder_without_checkpoints_says_what_it_holds(tmp_path):
    for name in ("a.h5", "b.h5", "c.onnx"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ArchiveError, match=r"no checkpoints in .*; there are .*: \.h5 2, \.onnx 1"):
        find_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.h5", b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras"),
        ("a.onnx", b"\x08\x07\x12\x07pytorch\x80", "it is a model in ONNX"),
        ("a.npy", b"\x93NUMPY\1\0", "it is an array of numpy"),
        ("a.bin", b"\0\1\2\3\xff", "Rename it, or save the weights with"),
        ("a.html", b"<html></html>", "it is a web page"),
    ],
)
def test_a_file_asked_for_that_is_no_checkpoint(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=rf"{name}' is not a checkpoint: .* must end.*{message}"):
        find_checkpoints(tmp_path / name)


def test_a_program_asked_for_as_a_checkpoint(tmp_path):
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, tmp_path / "a.pt2")
    with pytest.raises(ArchiveError, match=r"it is a program of torch\.export\. Pass it as"):
        find_checkpoints(tmp_path / "a.pt2")


def test_a_pipe_asked_for_by_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.bin")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe.bin", "pipe"):
        with pytest.raises(ArchiveError, match="is not a checkpoint"):
            find_checkpoints(tmp_path / name)
    torch.save(STATE, tmp_path / "a.pt")
    assert names(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("name", ["runs.tar", "runs.pth.tar", "runs.pt.tar"])
def test_a_tar_archive_of_checkpoints_stays_one(tmp_path, name):
    torch.save(STATE, tmp_path / "a.pt")
    folder = tmp_path / "packed"
    folder.mkdir()
    with tarfile.open(folder / name, "w") as archive:
        archive.add(tmp_path / "a.pt", "run/a.pt")
        archive.add(tmp_path / "a.pt", "run/b.h5")
    aside: set[str] = set()
    (file,) = find_checkpoints(folder / name, aside=aside)
    assert file.uri.startswith("tar://run/a.pt::")
    assert [path.rpartition("/")[2] for path in aside] == ["b.h5"]
    assert_reads(folder / name)
    if name != "runs.tar":  # in a folder it is called what it is not
        with pytest.raises(CheckpointError, match=rf"{name}: a tar archive. Rename it to \.tar"):
            read_checkpoint(*find_checkpoints(folder))


def test_a_damaged_pth_tar_is_no_container(tmp_path):
    torch.save(STATE, tmp_path / "a.pth.tar")
    (tmp_path / "a.pth.tar").write_bytes((tmp_path / "a.pth.tar").read_bytes()[:-50])
    (tmp_path / "b.pth.tar").write_bytes(b"")
    (tmp_path / "c.pth.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for name, message in (("a", "truncated"), ("b", "it is empty"), ("c", "a pointer of Git LFS")):
        with pytest.raises(CheckpointError, match=rf"{name}\.pth\.tar: .*{message}"):
            read_checkpoint(*find_checkpoints(tmp_path / f"{name}.pth.tar"))


def test_remote_files(tmp_path):
    torch.save(STATE, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    with tarfile.open(tmp_path / "runs.tar", "w") as archive:
        archive.add(tmp_path / "a.pt", "run/a.pt")
    memory = fsspec.filesystem("memory")
    tar = (tmp_path / "runs.tar").read_bytes()
    files = {"a.pth.tar": data, "b.bin": data, "c.h5": b"\x89HDF\r\n\x1a\n", "runs.pth.tar": tar}
    memory.pipe({f"/lipfast-unnamed/{name}": content for name, content in files.items()})
    try:
        for name in ("a.pth.tar", "b.bin", "runs.pth.tar"):
            assert_reads(f"memory://lipfast-unnamed/{name}")
        aside: set[str] = set()
        assert names("memory://lipfast-unnamed", aside) == ["a.pth.tar", "runs.pth.tar"]
        assert by_ending(aside) == {".bin": 1, ".h5": 1} or by_ending(aside) == {
            ".h5": 1,
            ".bin": 1,
        }
        with pytest.raises(ArchiveError, match=r"c\.h5' is not a checkpoint: .*HDF5"):
            find_checkpoints("memory://lipfast-unnamed/c.h5")
    finally:
        memory.rm("/lipfast-unnamed", recursive=True)


def test_blobs_of_a_cache_are_taken_once(tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file(STATE, blobs / ("0123456789abcdef" * 4))
    (tmp_path / "snapshots").mkdir()
    link = tmp_path / "snapshots" / "model.safetensors"
    link.symlink_to(blobs / ("0123456789abcdef" * 4))
    assert names(tmp_path) == ["model.safetensors"]


def test_endings_are_counted_in_few_words():
    paths = [f"a/events.{number}" for number in range(50)] + [
        f"b.x{number}" for number in range(40)
    ]
    counts = by_ending([*paths, "c.\x1b[2J"])
    assert counts["a number"] == 50
    assert sum(counts.values()) == 91
    assert len(counts) < 20
    assert all(end.isprintable() for end in counts)
