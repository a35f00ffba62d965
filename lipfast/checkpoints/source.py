"""Find the checkpoints of an archive: a file, a folder, a glob, a manifest or any fsspec URL."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.home import expanded
from lipfast.checkpoints.manifest import Entry, read_manifest
from lipfast.checkpoints.names import (
    MANIFEST_SUFFIXES,
    SUFFIXES,
    checkpoints_of,
    container_protocol,
    is_checkpoint,
    is_index,
    shards_of,
    sidecars_of,
)
from lipfast.checkpoints.text import printable
from lipfast.errors import ArchiveError

Archive: TypeAlias = "str | os.PathLike[str]"

NamesIn: TypeAlias = "Callable[[str], set[str]]"

MAGIC = "*?["


def find_checkpoints(
    archive: Archive | Sequence[Archive], *, may_be_empty: bool = False
) -> list[CheckpointFile]:
    """List the checkpoints of an archive, sorted by URI, each file once.

    Folders are searched recursively, through links too; names that begin with a dot are skipped
    (temporary and version-control files), unless asked for by name. A glob may match files and
    folders, `**` any depth. A sharded checkpoint is its index file. Optimizer, scheduler and
    generator states that trainers keep beside the weights are left out.

    Args:
        archive: a file, a folder, a glob, a `.zip` or `.tar` file, a manifest (`.csv`, `.jsonl`),
            an fsspec URL (`file://`, `memory://`, `s3://`, `zip://...::...`) of any of these, or
            several.
        may_be_empty: an archive without checkpoints, or whose folder is not there yet, is no error.

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
    names_in = cache(_names_in)  # a folder may hold thousands of the files that are asked for
    for one in several:
        name = os.fspath(one)
        if may_be_empty and _is_local(name) and not Path(_without_scheme(name)).exists():
            continue
        files = list(_find(name, names_in))
        found.update((file.uri, file) for file in files)
        if not files and not may_be_empty:
            raise ArchiveError(
                f"no checkpoints in '{name}': looked for files that end in "
                f"{', '.join(SUFFIXES)}, in it and in all folders below"
            )
    return [found[uri] for uri in sorted(found)]


def _without_scheme(archive: str) -> str:
    return archive.removeprefix("file://")


def _is_local(archive: str) -> bool:
    path = _without_scheme(archive)
    return "://" not in path and "::" not in path


def _find(archive: str, names_in: NamesIn) -> Iterator[CheckpointFile]:
    from lipfast.checkpoints import remote  # noqa: PLC0415 (fsspec is slow to import)

    if archive.lower().endswith(MANIFEST_SUFFIXES):
        return _listed(read_manifest(_without_scheme(archive)), names_in)
    if not _is_local(archive):
        protocol = None if "::" in archive else container_protocol(archive)
        return remote.find(f"{protocol}://::{archive}" if protocol else archive)
    path = expanded(_without_scheme(archive))
    protocol = container_protocol(path.name)
    if protocol and path.is_file():
        return remote.find(f"{protocol}://::file://{path.absolute()}")
    return _find_local(str(path), names_in)


def _listed(entries: Iterable[Entry], names_in: NamesIn) -> Iterator[CheckpointFile]:
    from lipfast.checkpoints import remote  # noqa: PLC0415

    beside = cache(remote.beside)
    for entry in entries:
        name = _without_scheme(entry.path)
        if not _is_local(name):
            yield remote.locate(name, entry.metadata, beside)
            continue
        path = os.path.abspath(expanded(name))  # noqa: PTH100 (without following links)
        try:
            folder = str(PurePosixPath(path).parent)
            yield local_file(path, folder, names_in(folder), entry.metadata)
        except OSError:  # listed, so that its row gives the reason
            shown = printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
            folder = printable(Path(path).parent.name)
            yield CheckpointFile(f"file://{shown}", path, 0, 0.0, folder, extra=entry.metadata)


# Local files: os.walk and os.stat, several times faster than a generic file system.


def _find_local(archive: str, names_in: NamesIn) -> Iterator[CheckpointFile]:
    path = Path(archive)
    try:
        if path.is_dir():
            yield from _walk(str(path.absolute()), str(path.absolute()))
        elif path.exists():
            require_suffix(path.name, archive)
            folder = str(path.absolute().parent)
            yield local_file(str(path.absolute()), folder, names_in(folder))
        elif glob.has_magic(archive):
            yield from _expand(str(path.absolute()), archive, names_in)
        else:
            raise ArchiveError(f"no such file or folder: '{archive}'")
    except OSError as error:
        raise ArchiveError(f"cannot search '{archive}': {error}") from error


def _expand(pattern: str, archive: str, names_in: NamesIn) -> Iterator[CheckpointFile]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in MAGIC))
    root = str(Path(*parts[:fixed]))
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)
    if not matches:
        raise ArchiveError(f"nothing matches '{archive}': check the pattern, and quote it")
    for match in matches:
        if Path(match).is_dir():
            yield from _walk(match, root)
        elif is_checkpoint(match.rpartition("/")[2]):
            yield local_file(match, root, names_in(str(Path(match).parent)))


def _walk(top: str, root: str) -> Iterator[CheckpointFile]:
    def fail(error: OSError) -> None:
        raise ArchiveError(f"cannot search '{error.filename}': {error.strerror}") from error

    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=fail):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # links that form a loop
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        beside = set(names)
        for name in checkpoints_of(beside):
            # Files may vanish during the search: training prunes old checkpoints.
            with suppress(FileNotFoundError):
                yield local_file(os.path.join(folder, name), root, beside)  # noqa: PTH118 (fast)


def local_file(
    path: str,
    root: str,
    beside: set[str],
    extra: dict[str, bool | int | float | str] | None = None,
) -> CheckpointFile:
    """Describe a local file.

    Args:
        path: absolute.
        root: of the archive.
        beside: names of all files in its folder.
        extra: metadata that is known already.

    Raises:
        FileNotFoundError: it is gone.
    """
    parent, _, name = path.rpartition("/")
    paths = [path, *(f"{parent}/{shard}" for shard in _shards(name, beside))]
    statuses = [_status(one) for one in paths]
    shown = printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
    return CheckpointFile(
        uri=f"file://{shown}",
        path=path,
        size=sum(status.st_size for status in statuses),
        mtime=max(status.st_mtime for status in statuses),
        folder=printable(folder_of(path, root)),
        sidecars=tuple(f"{parent}/{sidecar}" for sidecar in sidecars_of(name, beside)),
        extra=extra or {},
    )


def _names_in(folder: str) -> set[str]:
    with suppress(OSError), os.scandir(folder or "/") as entries:
        return {entry.name for entry in entries}
    return set()


def _shards(name: str, beside: set[str]) -> list[str]:
    return shards_of(name, beside) if is_index(name) else []


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 (fast)
    except FileNotFoundError:
        raise
    except OSError:  # such as a link to itself: listed, so that reading it gives the reason
        return os.lstat(path)


def folder_of(path: str, root: str) -> str:
    """Return the parent folder relative to the root, or its own name directly below the root."""
    return _relative_folder(path[: path.rfind("/") + 1], root)


@lru_cache(maxsize=1024)  # an archive has many files in a folder
def _relative_folder(folder: str, root: str) -> str:
    parent = PurePosixPath(folder)
    try:
        relative = parent.relative_to(PurePosixPath(Path(root).as_posix()))
    except ValueError:
        return parent.name
    return parent.name if str(relative) == "." else str(relative)


def require_suffix(name: str, archive: str) -> None:
    """Refuse a file that was asked for by name and is no checkpoint.

    Raises:
        ArchiveError: says which endings are.
    """
    if not is_checkpoint(name.rpartition("/")[2]):
        raise ArchiveError(
            f"'{archive}' is not a checkpoint: its name must end in {_or(SUFFIXES)}. Rename it, or "
            "save the weights with safetensors.torch.save_file"
        )


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"
