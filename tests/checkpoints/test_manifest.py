from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.errors import ArchiveError, CheckpointError


def write(folder: Path) -> None:
    (folder / "a").mkdir()
    save_file({"w": torch.ones(1)}, folder / "a" / "1.safetensors", {"step": "1", "lr": "0.5"})
    torch.save({"w": torch.ones(2)}, folder / "2.pt")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_paths_and_metadata(tmp_path, kind):
    write(tmp_path)
    manifest = tmp_path / f"runs.{kind}"
    if kind == "csv":
        manifest.write_text(
            f"run,path,step,note\nfirst,a/1.safetensors,7,\nsecond,{tmp_path}/2.pt,8,x\n"
        )
    else:
        lines = [
            {"run": "first", "path": "a/1.safetensors", "step": 7, "note": None},
            {"run": "second", "path": f"file://{tmp_path}/2.pt", "step": 8, "note": "x"},
        ]
        manifest.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    files = find_checkpoints(manifest)
    by_name = {Path(file.path).name: read_checkpoint(file).metadata for file in files}
    assert by_name["1.safetensors"].run == "first"
    assert by_name["1.safetensors"].step == 7  # before what the header says
    assert by_name["1.safetensors"].values["lr"] == 0.5
    assert "note" not in by_name["1.safetensors"].values
    assert by_name["2.pt"].values == {"run": "second", "step": 8, "note": "x"}


def test_a_missing_checkpoint_is_found_out_when_it_is_read(tmp_path):
    (tmp_path / "runs.csv").write_text("uri,run\nmissing.pt,r\nmemory://nowhere/b.pt,s\n")
    missing, remote = find_checkpoints(tmp_path / "runs.csv")
    assert (missing.size, missing.mtime, missing.run) == (0, 0.0, "r")
    with pytest.raises(CheckpointError, match=r"missing\.pt: no such file"):
        read_checkpoint(missing)
    with pytest.raises(CheckpointError, match=r"b\.pt: no such file"):
        read_checkpoint(remote)


def test_a_manifest_in_memory_names_files_beside_it():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/lipfast-manifest/runs.csv": b"path\na.pt\n", "/lipfast-manifest/a.pt": b"12"})
    try:
        (file,) = find_checkpoints("memory://lipfast-manifest/runs.csv")
        assert (file.uri, file.size) == ("memory:///lipfast-manifest/a.pt", 2)
    finally:
        memory.rm("/lipfast-manifest", recursive=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"run,step\nr,1\n", "line 2: names no checkpoint; expected a column uri, path"),
        ("a.csv", b"path\na.pt,b\n", "line 2: more values than columns"),
        ("a.csv", b"path\n\xff.pt\n", "not UTF-8"),
        ("a.csv", b'path\n"a.pt\n', "line [12]: unexpected end of data"),
        ("a.csv", b"path,run\na\0.pt,r\n", "line 2: a zero byte in a path"),
        ("a.jsonl", b'{"path": "a.pt"}\n{"path"\n', "line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'{"path": "~\\ud800/a.pt"}', "line 1: a lone surrogate in a path"),
        ("a.jsonl", b"[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"run": "r"}', "line 1: names no checkpoint"),
    ],
)
def test_malformed_manifests(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArchiveError, match=message):
        find_checkpoints(tmp_path / name)
    with pytest.raises(ArchiveError, match="no such manifest"):
        find_checkpoints(tmp_path / "missing.csv")


def test_a_home_folder_of_nobody_is_a_path_like_any_other(tmp_path):
    (tmp_path / "a.csv").write_text("path\n~\x08/a.pt\n~nobody-of-this-name/b.pt\n")
    files = find_checkpoints(tmp_path / "a.csv")
    assert len(files) == 2
    for file in files:
        with pytest.raises(CheckpointError, match="no such file"):
            read_checkpoint(file)
