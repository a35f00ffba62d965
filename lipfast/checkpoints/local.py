"""Find checkpoints among local files, several times faster than a generic file system does."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from lipfast.checkpoints.file import CheckpointFile, folder_of
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.names import (
    MAGIC,
    checkpoints_of,
    is_checkpoint,
    shards_of,
    sidecars_of,
    stands_for,
)
from lipfast.checkpoints.unnamed import (
    holds_weights,
    is_open,
    local_head,
    not_looked_at,
    require_weights,
    taken_by_content,
)
from lipfast.errors import ArchiveError
from lipfast.text import printable

NamesIn: TypeAlias = "Callable[[str], set[str]]"


def find_local(archive: str, names_in: NamesIn, aside: set[str]) -> Iterator[CheckpointFile]:
    """List the checkpoints at a path.

    Args:
        archive: a file, a folder or a glob.
        names_in: names of the files in a folder.
        aside: takes the paths of files that are not looked at.

    Raises:
        ArchiveError: there is no such file or folder, or it cannot be searched.
    """
    path = Path(archive)
    try:
        if path.is_dir():
            yield from _walk_folder(str(path.absolute()), str(path.absolute()), aside)
        elif path.exists():
            require_weights(path.name, archive, lambda: local_head(archive))
            folder = str(path.absolute().parent)
            yield local_file(str(path.absolute()), folder, names_in(folder))
        elif glob.has_magic(archive):
            yield from _expand(str(path.absolute()), archive, names_in, aside)
        else:
            raise ArchiveError(f"no such file or folder: '{archive}'")
    except OSError as error:
        raise ArchiveError(f"cannot search '{archive}': {error}") from error


def _expand(
    pattern: str, archive: str, names_in: NamesIn, aside: set[str]
) -> Iterator[CheckpointFile]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in MAGIC))
    root = str(Path(*parts[:fixed]))
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)
    if not matches:
        raise ArchiveError(f"nothing matches '{archive}': check the pattern, and quote it")
    for match in matches:
        if Path(match).is_dir():
            yield from _walk_folder(match, root, aside)
            continue
        name = match.rpartition("/")[2]
        if is_checkpoint(name) or (is_open(name) and holds_weights(match)):
            yield local_file(match, root, names_in(str(Path(match).parent)))
        else:
            aside.add(match)


def _walk_folder(top: str, root: str, aside: set[str]) -> Iterator[CheckpointFile]:
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
        found = [*checkpoints_of(beside), *taken_by_content(folder, beside)]
        shards = (shard for name in found for shard in shards_of(name, beside))
        aside.update(f"{folder}/{name}" for name in not_looked_at(beside, {*found, *shards}))
        for name in found:
            # Files may vanish during the search: training prunes old checkpoints.
            with suppress(FileNotFoundError):
                yield local_file(os.path.join(folder, name), root, beside)  # noqa: PTH118 (fast)


def local_file(
    path: str,
    root: str,
    beside: set[str],
    extra: Mapping[str, Scalar] | None = None,
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
    name = stands_for(name, beside)
    path = f"{parent}/{name}"
    paths = [path, *(f"{parent}/{shard}" for shard in shards_of(name, beside))]
    statuses = [_status(one) for one in paths]
    return CheckpointFile(
        uri=_uri(path),
        path=path,
        size=sum(status.st_size for status in statuses),
        mtime=max(status.st_mtime for status in statuses),
        folder=printable(folder_of(path, root)),
        sidecars=tuple(f"{parent}/{sidecar}" for sidecar in sidecars_of(name, beside)),
        extra=extra or {},
    )


def missing_file(path: str, extra: Mapping[str, Scalar]) -> CheckpointFile:
    """Describe a file that cannot be looked at; reading it gives the reason."""
    folder = printable(Path(path).parent.name)
    return CheckpointFile(_uri(path), path, 0, 0.0, folder, extra=extra)


def names_in(folder: str) -> set[str]:
    """List the names in a folder; none where that is not possible."""
    with suppress(OSError), os.scandir(folder or "/") as entries:
        return {entry.name for entry in entries}
    return set()


def _uri(path: str) -> str:
    return f"file://{printable(os.fsencode(path).decode('utf-8', 'backslashreplace'))}"


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116 (fast)
    except FileNotFoundError:
        raise
    except OSError:  # such as a link to itself: listed, so that reading it gives the reason
        return os.lstat(path)
