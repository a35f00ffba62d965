"""Archives inside zip and tar files."""

from __future__ import annotations

import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.errors import CheckpointError


@pytest.fixture
def folder(tmp_path) -> Path:
    for run in range(2):
        for step in range(3):
            path = tmp_path / "runs" / f"run{run}" / f"step_{step}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"w": torch.full((3,), 10.0 * run + step)}, path)
    return tmp_path / "runs"


def pack(folder: Path, name: str) -> Path:
    packed = folder.parent / name
    if name.endswith(".zip"):
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*.safetensors")):
                archive.write(path, path.relative_to(folder))
    else:
        mode = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz"}[packed.suffix]
        with tarfile.open(packed, mode) as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
    return packed


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz"])
def test_a_packed_folder(folder, name):
    packed = pack(folder, name)
    files = find_checkpoints(packed)
    protocol = "zip" if name.endswith(".zip") else "tar"
    assert files[0].uri == f"{protocol}://run0/step_0.safetensors::file://{packed}"
    assert [file.run for file in files] == ["run0"] * 3 + ["run1"] * 3
    assert files[0].mtime > 0
    with ThreadPoolExecutor(4) as pool:  # one stream serves all readers
        read = list(pool.map(read_checkpoint, files * 5))
    expected = [10.0 * run + step for run in range(2) for step in range(3)] * 5
    assert [checkpoint.state_dict["w"][0].item() for checkpoint in read] == expected
    assert read[1].metadata.step == 1


def test_a_chained_url_and_a_glob_inside(folder):
    packed = pack(folder, "a.zip")
    assert len(find_checkpoints(f"zip://run1/*.safetensors::{packed}")) == 3
    (one,) = find_checkpoints(f"zip://run1/step_2.safetensors::file://{packed}")
    assert read_checkpoint(one).state_dict["w"][0] == 12.0


def test_two_containers_do_not_share_names(folder):
    first, second = pack(folder, "a.zip"), pack(folder, "b.zip")
    assert len(find_checkpoints([first, second])) == 12


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.pt", b"\0" * (80 << 20))
        archive.writestr("b.safetensors", b"\0" * (1 << 20))
    assert (tmp_path / "bomb.zip").stat().st_size < 1 << 18
    bomb, small = find_checkpoints(tmp_path / "bomb.zip")
    with pytest.raises(CheckpointError, match="would become 83886080 when decompressed"):
        read_checkpoint(bomb)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_checkpoint(small)


def test_names_that_leave_the_container_reach_nothing(tmp_path):
    save_file({"w": torch.ones(1)}, tmp_path / "outside.safetensors")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        link = tarfile.TarInfo("link.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside.safetensors"
        archive.addfile(link)
        archive.add(tmp_path / "outside.safetensors", "../../up.safetensors")
    files = find_checkpoints(tmp_path / "a.tar")
    assert files
    for file in files:
        if "up.safetensors" in file.path:  # the member of that name, not a file outside
            assert read_checkpoint(file).state_dict["w"].tolist() == [1.0]
        else:
            with pytest.raises(CheckpointError):
                read_checkpoint(file)
