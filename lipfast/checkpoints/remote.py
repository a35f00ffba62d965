"""Find checkpoints through fsspec: object stores, memory, and the insides of zip and tar files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import fsspec
from fsspec import AbstractFileSystem

from lipfast.checkpoints.content import HEAD
from lipfast.checkpoints.file import CheckpointFile, folder_of
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.names import (
    DISTRIBUTED,
    MAGIC,
    checkpoints_of,
    shards_of,
    sidecars_of,
    stands_for,
)
from lipfast.checkpoints.unnamed import not_looked_at, require_weights
from lipfast.errors import ArchiveError
from lipfast.text import printable

_PACKAGES = {
    "abfs": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "sftp": "paramiko",
}
"""Protocol -> what fsspec needs for it."""

Infos = dict[str, dict[str, Any]]

Folder = dict[str, tuple[str, Mapping[str, Any]]]
"""The files of one folder: name to full name and what is known of it."""


@dataclass(frozen=True)
class _Place:
    """A file system and, for the inside of a zip or tar file, what is known of that file."""

    filesystem: AbstractFileSystem
    container: str = ""  # the URL behind "::"
    size: int = 0
    mtime: float = 0.0

    def uri(self, name: str) -> str:
        inner = self.filesystem.unstrip_protocol(name)
        return printable(f"{inner}::{self.container}" if self.container else inner)


def find_remote(archive: str, aside: set[str]) -> Iterator[CheckpointFile]:
    """List the checkpoints at a URL.

    Args:
        archive: a URL that fsspec knows.
        aside: takes the paths of files that are not looked at.

    Raises:
        ArchiveError: it cannot be searched: unknown protocol, missing package, no access.
    """
    try:
        # fsspec knows the compression of .tar.gz, not of .tgz
        options = {"tar": {"compression": "gzip"}} if archive.lower().endswith(".tgz") else {}
        filesystem, path = fsspec.url_to_fs(archive, **options)
        place = _place(archive, filesystem)
        if any(c in path for c in MAGIC):
            head = path[: min(path.index(c) for c in MAGIC if c in path)]
            root = head.rpartition("/")[0]
            matches = filesystem.glob(path, detail=True)
        elif path and filesystem.isfile(path):
            name = path.rpartition("/")[2]
            require_weights(name, archive, lambda: filesystem.cat_file(path, end=HEAD))
            root = path.rpartition("/")[0]
            yield _file(place, path, filesystem.info(path), root, beside(filesystem, root))
            return
        elif filesystem.exists(path) or not path:
            root = path
            matches = filesystem.find(path, detail=True)
        else:
            raise ArchiveError(
                f"no such file or folder: '{archive}', or it cannot be reached: check the URL, the "
                "network and the credentials"
            )
        yield from _files(place, matches, root, aside)
    except ArchiveError:
        raise
    except ImportError as error:
        package = _PACKAGES.get(archive.partition("://")[0])
        how = f"pip install {package}" if package else "install the package that it names"
        raise ArchiveError(f"cannot open '{archive}': {how} ({error})") from error
    except Exception as error:  # each file system has errors of its own
        raise ArchiveError(
            f"cannot search '{archive}': {type(error).__name__}: {error}. Check the URL, the "
            "network and the credentials"
        ) from error


def remote_head(url: str) -> bytes:
    """The first bytes at a URL; none where they cannot be read."""
    try:
        filesystem, path = fsspec.url_to_fs(url)
        return bytes(filesystem.cat_file(path, end=HEAD))
    except Exception:  # each file system has errors of its own, which a search will meet again
        return b""


def locate(
    url: str,
    metadata: Mapping[str, Scalar],
    beside: Callable[[AbstractFileSystem, str], Folder],
) -> CheckpointFile:
    """Describe one checkpoint that a manifest names; one that is missing fails when it is read."""
    try:
        filesystem, path = fsspec.url_to_fs(url)
        place = _place(url, filesystem)
        root = path.rpartition("/")[0]
        try:
            info, others = filesystem.info(path), beside(filesystem, root)
        except FileNotFoundError:
            info, others = {}, {}
        return _file(place, path, info, root, others, extra=metadata)
    except Exception as error:  # each file system has errors of its own
        raise ArchiveError(f"cannot look up '{url}': {type(error).__name__}: {error}") from error


def _place(archive: str, filesystem: AbstractFileSystem) -> _Place:
    _, chained, container = archive.partition("::")
    if not chained:
        return _Place(filesystem)
    outer, path = fsspec.url_to_fs(container)
    info = outer.info(path)
    shown = container if "://" in container else outer.unstrip_protocol(path)
    return _Place(filesystem, shown, int(info.get("size") or 0), _mtime(info))


def beside(filesystem: AbstractFileSystem, folder: str) -> Folder:
    """List one folder; empty where that is not possible."""
    try:
        listed = filesystem.ls(folder, detail=True)
    except (OSError, NotImplementedError):
        return {}
    return _by_name({info["name"]: info for info in listed})


def _by_name(infos: Infos) -> Folder:
    return {full.rpartition("/")[2]: (full, info) for full, info in infos.items()}


def _files(place: _Place, matches: Infos, root: str, aside: set[str]) -> Iterator[CheckpointFile]:
    folders: dict[str, Infos] = defaultdict(dict)
    for name, info in matches.items():
        if info.get("type") == "directory":
            yield from _files(place, place.filesystem.find(name, detail=True), root, aside)
        elif not _hidden(name.removeprefix(root)):
            folders[name.rpartition("/")[0]][name] = info
    for folder in sorted(folders):
        others = _by_name(folders[folder])
        found = list(checkpoints_of(others))
        shards = (shard for name in found for shard in shards_of(name, others))
        aside.update(f"{folder}/{name}" for name in not_looked_at(others, {*found, *shards}))
        for name in found:
            yield _file(place, *others[name], root, others)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.removesuffix(f"/{DISTRIBUTED}").split("/"))


def _file(
    place: _Place,
    path: str,
    info: Mapping[str, Any],
    root: str,
    others: Folder,
    *,
    extra: Mapping[str, Scalar] | None = None,
) -> CheckpointFile:
    name = stands_for(path.rpartition("/")[2], others)
    if name in others:
        path, info = others[name]
    infos = [info, *(others[shard][1] for shard in shards_of(name, others))]
    packed = [one.get("compress_size") for one in infos]
    compressed = (place.size or None) if None in packed else sum(int(n or 0) for n in packed)
    return CheckpointFile(
        uri=place.uri(path),
        path=path,
        size=sum(int(one.get("size") or 0) for one in infos),
        mtime=max(_mtime(one) for one in infos) or place.mtime,
        folder=printable(folder_of(path, root) or "."),
        filesystem=place.filesystem,
        sidecars=tuple(others[sidecar][0] for sidecar in sidecars_of(name, others)),
        extra=extra or {},
        stored=None if compressed is None else int(compressed),
    )


def _mtime(info: Mapping[str, Any]) -> float:
    for key in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(key)
        if isinstance(value, str):
            try:
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
            except ValueError:
                continue
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
