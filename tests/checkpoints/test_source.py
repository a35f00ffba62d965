from __future__ import annotations

import os
import sys
from pathlib import Path

import fsspec
import pytest

from lipfast.checkpoints import find_checkpoints, read_checkpoint
from lipfast.errors import ArchiveError, CheckpointError


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def found(archive) -> list[str]:
    return [Path(file.path).name for file in find_checkpoints(archive)]


def test_folder_is_searched_recursively_and_sorted(tmp_path):
    make(tmp_path, "b/2.pt", "a/1.safetensors", "a/deep/3.pth", "a/notes.txt", "0.PT")
    files = find_checkpoints(tmp_path)
    assert [file.uri for file in files] == sorted(file.uri for file in files)
    assert sorted(Path(file.path).name for file in files) == [
        "0.PT",
        "1.safetensors",
        "2.pt",
        "3.pth",
    ]
    by_name = {Path(file.path).name: file for file in files}
    assert by_name["3.pth"].folder == "a/deep"
    assert by_name["0.PT"].folder == tmp_path.name
    assert by_name["0.PT"].suffix == ".pt"
    assert by_name["2.pt"].size == len("b/2.pt")
    assert by_name["2.pt"].mtime == (tmp_path / "b/2.pt").stat().st_mtime
    assert by_name["2.pt"].uri == f"file://{tmp_path}/b/2.pt"


def test_hidden_files_are_skipped_unless_named(tmp_path):
    make(tmp_path, "a.pt", ".b.pt", ".git/c.pt")
    assert found(tmp_path) == ["a.pt"]
    assert found(tmp_path / ".b.pt") == [".b.pt"]
    assert found(tmp_path / ".git") == ["c.pt"]


def test_links_that_loop_end(tmp_path):
    make(tmp_path, "runs/a.pt")
    (tmp_path / "runs/again").symlink_to(tmp_path / "runs")
    (tmp_path / "runs/lost.pt").symlink_to(tmp_path / "nowhere.pt")
    assert found(tmp_path / "runs") == ["a.pt"]


def test_glob_matches_files_and_folders(tmp_path):
    make(tmp_path, "w1/s/1.pt", "w2/2.pt", "other/3.pt", "w3.pt")
    assert sorted(found(str(tmp_path / "w*"))) == ["1.pt", "2.pt", "w3.pt"]
    assert sorted(found(str(tmp_path / "**/*.pt"))) == ["1.pt", "2.pt", "3.pt", "w3.pt"]
    assert find_checkpoints(str(tmp_path / "w1/*"))[0].folder == "s"


def test_several_archives_count_each_file_once(tmp_path):
    make(tmp_path, "a/1.pt", "b/2.pt")
    assert found([tmp_path / "a", tmp_path, tmp_path / "b/2.pt"]) == ["1.pt", "2.pt"]


def test_file_url_is_the_same_file(tmp_path):
    make(tmp_path, "a.pt")
    assert find_checkpoints(f"file://{tmp_path}") == find_checkpoints(tmp_path)


def test_memory_url():
    memory = fsspec.filesystem("memory")
    memory.pipe({"/lipfast-source/run1/a.pt": b"abc", "/lipfast-source/b.txt": b""})
    try:
        for archive in (
            "memory://lipfast-source",
            "memory://lipfast-source/run1/a.pt",
            "memory://lipfast-source/run1/*.pt",
            "memory://lipfast-source/r*",
        ):
            (file,) = find_checkpoints(archive)
            assert file.uri == "memory:///lipfast-source/run1/a.pt"
            assert (file.size, file.suffix) == (3, ".pt")
            assert file.mtime > 0
        assert find_checkpoints("memory://lipfast-source")[0].folder == "run1"
        with pytest.raises(ArchiveError, match="no such file or folder"):
            find_checkpoints("memory://lipfast-source/missing")
    finally:
        memory.rm("/lipfast-source", recursive=True)


def test_control_characters_and_foreign_bytes_stay_out_of_the_uri(tmp_path):
    make(tmp_path, "a\x1b[2J\n.pt")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pt"))).write_bytes(b"")
    files = find_checkpoints(tmp_path)
    assert sorted(file.uri.rpartition("/")[2] for file in files) == [
        "\\xff.pt",
        "a\\x1b[2J\\x0a.pt",
    ]
    assert all(Path(file.path).exists() for file in files)


@pytest.mark.parametrize(
    ("make_archive", "message"),
    [
        (lambda root: root / "missing", "no such file or folder: '.*missing'"),
        (lambda root: root / "empty", r"no checkpoints in '.*empty': .*\.safetensors, \.pt, \.pth"),
        (lambda root: root / "notes.txt", "'.*notes.txt' is not a checkpoint: .* must end in"),
        (lambda root: str(root / "x*.pt"), "nothing matches '.*x"),
        (lambda root: [], "no archive given"),
        (lambda root: "nosuchprotocol://a/b", "cannot (open|search) 'nosuchprotocol://a/b'"),
    ],
)
def test_bad_archives(tmp_path, make_archive, message):
    make(tmp_path, "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArchiveError, match=message):
        find_checkpoints(make_archive(tmp_path))


def test_a_link_to_itself_and_a_pipe_are_reported_not_waited_for(tmp_path):
    (tmp_path / "itself.pt").symlink_to("itself.pt")
    os.mkfifo(tmp_path / "pipe.safetensors")
    itself, pipe = find_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="Too many levels of symbolic links"):
        read_checkpoint(itself)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_checkpoint(pipe)


@pytest.mark.parametrize("wrong", [3, [None], {"a": 1}])
def test_an_archive_of_the_wrong_type(wrong):
    with pytest.raises(ArchiveError, match="pass a path, a URL, or a list"):
        find_checkpoints(wrong)


@pytest.mark.parametrize("how", ["glob", "list", "manifest"])
def test_a_folder_of_many_files_is_listed_once(tmp_path, monkeypatch, how):
    names = [f"step{number}.pt" for number in range(50)]
    make(tmp_path, *names)
    make(tmp_path, "step7.json")
    (tmp_path / "all.csv").write_text("path\n" + "\n".join(names))
    listed, genuine = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: listed.append(folder) or genuine(folder))
    archives = {
        "glob": [str(tmp_path / "st?p*.pt")],
        "list": [tmp_path / name for name in names],
        "manifest": [tmp_path / "all.csv"],
    }
    files = find_checkpoints(archives[how])
    assert len(files) == 50
    assert len(listed) <= 3  # a glob lists it for itself too
    sidecars = {Path(file.path).name: file.sidecars for file in files if file.sidecars}
    assert sidecars == {"step7.pt": (str(tmp_path / "step7.json"),)}


@pytest.mark.parametrize(
    ("url", "package"),
    [("gs://bucket/runs", "gcsfs"), ("s3://bucket/runs", "s3fs"), ("hf://a/b", "huggingface_hub")],
)
def test_a_missing_driver_says_what_to_install(monkeypatch, url, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, url.partition(":")[0], raising=False)
    with pytest.raises(ArchiveError, match=rf"cannot open '{url}': pip install {package} \("):
        find_checkpoints(url)


class Unreachable(fsspec.AbstractFileSystem):
    """An object store without a network."""

    protocol = "unreachable"

    def exists(self, path, **options):
        raise ConnectionError("Name or service not known")

    info = ls = exists


class Absent(fsspec.AbstractFileSystem):
    """A server that answers nothing, which its driver takes for "no such file"."""

    protocol = "absent"

    def info(self, path, **options):
        raise FileNotFoundError(path)

    ls = info


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unreachable, "cannot search 'unreachable://bucket/runs': ConnectionError: Name or"),
        (Absent, "no such file or folder: 'absent://bucket/runs', or it cannot be reached"),
    ],
)
def test_no_network_says_what_to_check(kind, message):
    fsspec.register_implementation(kind.protocol, kind, clobber=True)
    with pytest.raises(ArchiveError, match=message) as error:
        find_checkpoints(f"{kind.protocol}://bucket/runs")
    assert "heck the URL, the network and the credentials" in str(error.value)
