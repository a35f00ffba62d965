"""Find the checkpoints of an archive: a file, a folder, a glob, a manifest or any fsspec URL."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from lipfast.checkpoints.content import is_tar
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.home import expanded
from lipfast.checkpoints.local import NamesIn, find_local, local_file, missing_file, names_in
from lipfast.checkpoints.manifest import Entry, read_manifest
from lipfast.checkpoints.names import (
    MANIFEST_SUFFIXES,
    SUFFIXES,
    container_protocol,
    is_checkpoint,
)
from lipfast.checkpoints.remote import beside, find_remote, locate, remote_head
from lipfast.checkpoints.unnamed import by_ending, holds_weights, listed, local_head
from lipfast.errors import ArchiveError

Archive: TypeAlias = "str | os.PathLike[str]"


def find_checkpoints(
    archive: Archive | Sequence[Archive],
    *,
    may_be_empty: bool = False,
    aside: set[str] | None = None,
) -> list[CheckpointFile]:
    """List the checkpoints of an archive, sorted by URI, each file once.

    Folders are searched recursively, through links too; names that begin with a dot are skipped
    (temporary and version-control files), unless asked for by name. A glob may match files and
    folders, `**` any depth. A sharded checkpoint is its index file, a folder of
    `torch.distributed.checkpoint` its `.metadata`. Optimizer, scheduler and generator states that
    trainers keep beside the weights are left out. Local files whose endings
    say nothing (`.bin`, `.pkl`, `.model`, numbers, none ...) are taken where their content is that
    of torch.save or safetensors; at a URL only where they are asked for by name.

    Args:
        archive: a file, a folder, a glob, a `.zip` or `.tar` file, a manifest (`.csv`, `.jsonl`),
            an fsspec URL (`file://`, `memory://`, `s3://`, `zip://...::...`) of any of these, or
            several.
        may_be_empty: an archive without checkpoints, or whose folder is not there yet, is no error.
        aside: takes the paths of the files that are not looked at: those with other names, and
            states of optimizers and the like.

    Returns:
        The files that end in one of `SUFFIXES`, and indexes of sharded checkpoints.

    Raises:
        ArchiveError: the archive is missing or unreadable, or holds no checkpoints.

    Example:
        >>> import tempfile, pathlib
        >>> root = pathlib.Path(tempfile.mkdtemp())
        >>> (root / "w64").mkdir()
        >>> _ = (root / "w64" / "step1.safetensors").write_bytes(b"")
        >>> [(file.folder, file.size) for file in find_checkpoints(root)]
        [('w64', 0)]
    """
    several = [archive] if isinstance(archive, (str, os.PathLike)) else archive
    if not isinstance(several, (list, tuple)) or not all(
        isinstance(one, (str, os.PathLike)) for one in several
    ):
        raise ArchiveError(f"the archive is {archive!r}: pass a path, a URL, or a list of them")
    if not several:
        raise ArchiveError("no archive given: pass a file, a folder, a glob or a URL")
    found: dict[str, CheckpointFile] = {}
    known_names = cache(names_in)  # a folder may hold thousands of the files that are asked for
    for one in several:
        name = os.fspath(one)
        if may_be_empty and _is_local(name) and not Path(_without_scheme(name)).exists():
            continue
        passed: set[str] = set()
        files = list(_find(name, known_names, passed))
        if aside is not None:
            aside |= passed
        found.update((file.uri, file) for file in files)
        if not files and not may_be_empty:
            raise ArchiveError(
                f"no checkpoints in '{name}': looked for files that end in "
                f"{', '.join(SUFFIXES)}, in it and in all folders below{_others(passed)}"
            )
    return [found[uri] for uri in sorted(found)]


def _others(passed: set[str]) -> str:
    return f"; there are others, by their endings: {listed(by_ending(passed))}" if passed else ""


def _without_scheme(archive: str) -> str:
    return archive.removeprefix("file://")


def _is_local(archive: str) -> bool:
    path = _without_scheme(archive)
    return "://" not in path and "::" not in path


def _find(archive: str, names: NamesIn, aside: set[str]) -> Iterator[CheckpointFile]:
    if archive.lower().endswith(MANIFEST_SUFFIXES):
        return _listed(read_manifest(_without_scheme(archive)), names)
    if not _is_local(archive):
        protocol = None if "::" in archive else container_protocol(archive)
        if protocol and is_checkpoint(archive) and not is_tar(remote_head(archive)):
            protocol = None  # a.pth.tar
        return find_remote(f"{protocol}://::{archive}" if protocol else archive, aside)
    path = expanded(_without_scheme(archive))
    protocol = container_protocol(path.name)
    if protocol and path.is_file() and not holds_weights(str(path)):
        named = is_checkpoint(path.name) and not is_tar(local_head(str(path)))
        if not named:  # else a.pth.tar, damaged
            return find_remote(f"{protocol}://::file://{path.absolute()}", aside)
    return find_local(str(path), names, aside)


def _listed(entries: Iterable[Entry], names: NamesIn) -> Iterator[CheckpointFile]:
    others = cache(beside)
    for entry in entries:
        name = _without_scheme(entry.path)
        if not _is_local(name):
            yield locate(name, entry.metadata, others)
            continue
        path = os.path.abspath(expanded(name))  # noqa: PTH100 (without following links)
        try:
            folder = str(PurePosixPath(path).parent)
            yield local_file(path, folder, names(folder), entry.metadata)
        except OSError:  # listed, so that its row gives the reason
            yield missing_file(path, entry.metadata)
