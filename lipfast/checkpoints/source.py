"""Find the checkpoints of an archive: a file, a folder, a glob or any fsspec URL."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from lipfast.checkpoints.text import printable
from lipfast.errors import ArchiveError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SUFFIXES = (".safetensors", ".pt", ".pth")
"""File name endings that mark a checkpoint."""

Archive: TypeAlias = "str | os.PathLike[str]"

_MAGIC = "*?["


@dataclass(frozen=True)
class CheckpointFile:
    r"""One checkpoint of an archive, found but not read.

    Attributes:
        uri: what names it everywhere: protocol and absolute path, not percent-encoded
            (`file:///runs/w64/step100.safetensors`), as fsspec opens it. Control
            characters and bytes that are not UTF-8 are shown as `\xNN`.
        path: the path that `filesystem` opens; the operating system's path when that is None.
        size: bytes.
        mtime: time of the last change, seconds since 1970; 0.0 where a file system has none.
        folder: the parent folder relative to the archive (the archive's own name for a checkpoint
            directly in it): the run's name where the metadata has none.
        filesystem: the fsspec file system; None for local files.
    """

    uri: str
    path: str
    size: int
    mtime: float
    folder: str
    filesystem: AbstractFileSystem | None = field(default=None, repr=False, compare=False)

    @property
    def suffix(self) -> str:
        """The file name's ending, in lower case: one of `SUFFIXES`."""
        return PurePosixPath(self.path).suffix.lower()


def find_checkpoints(archive: Archive | Sequence[Archive]) -> list[CheckpointFile]:
    """List the checkpoints of an archive, sorted by URI, each file once.

    Folders are searched recursively, through links too; names that begin with a dot are skipped
    (temporary and version-control files), unless asked for by name. A glob may match files and
    folders, `**` any depth.

    Args:
        archive: a file, a folder, a glob, an fsspec URL (`file://`, `memory://`, `s3://` ...) of
            any of these, or several.

    Returns:
        The files that end in one of `SUFFIXES`.

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
    for one in several:
        files = list(_find(os.fspath(one)))
        found.update((file.uri, file) for file in files)
        if not files:
            raise ArchiveError(
                f"no checkpoints in '{os.fspath(one)}': looked for files that end in "
                f"{', '.join(SUFFIXES)}, in it and in all folders below"
            )
    return [found[uri] for uri in sorted(found)]


def _find(archive: str) -> Iterator[CheckpointFile]:
    if archive.startswith("file://"):
        archive = archive.removeprefix("file://")
    if "://" in archive or "::" in archive:
        return _find_remote(archive)
    return _find_local(archive)


# Local files: os.walk and os.stat, several times faster than a generic file system.


def _find_local(archive: str) -> Iterator[CheckpointFile]:
    path = Path(archive).expanduser()
    try:
        if path.is_dir():
            yield from _walk(str(path.absolute()), str(path.absolute()))
        elif path.exists():
            _require_suffix(path.name, archive)
            yield _local_file(str(path.absolute()), str(path.absolute().parent))
        elif glob.has_magic(archive):
            yield from _expand(str(path.absolute()), archive)
        else:
            raise ArchiveError(f"no such file or folder: '{archive}'")
    except OSError as error:
        raise ArchiveError(f"cannot search '{archive}': {error}") from error


def _expand(pattern: str, archive: str) -> Iterator[CheckpointFile]:
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in _MAGIC))
    root = str(Path(*parts[:fixed]))
    matches = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (absolute patterns)
    if not matches:
        raise ArchiveError(f"nothing matches '{archive}': check the pattern, and quote it")
    for match in matches:
        if Path(match).is_dir():
            yield from _walk(match, root)
        elif _is_checkpoint(match):
            yield _local_file(match, root)


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
        for name in sorted(names):
            if _is_checkpoint(name) and not name.startswith("."):
                # Files may vanish during the search: training prunes old checkpoints.
                with suppress(FileNotFoundError):
                    yield _local_file(os.path.join(folder, name), root)  # noqa: PTH118 (fast)


def _local_file(path: str, root: str) -> CheckpointFile:
    try:
        status = os.stat(path)  # noqa: PTH116 (fast)
    except FileNotFoundError:
        raise
    except OSError:  # such as a link to itself: listed, so that reading it gives the reason
        status = os.lstat(path)
    shown = printable(os.fsencode(path).decode("utf-8", "backslashreplace"))
    return CheckpointFile(
        uri=f"file://{shown}",
        path=path,
        size=status.st_size,
        mtime=status.st_mtime,
        folder=printable(_folder(path, root)),
    )


# Everything else, through fsspec.


def _find_remote(archive: str) -> Iterator[CheckpointFile]:
    import fsspec  # noqa: PLC0415 (slow to import, seldom needed)

    try:
        filesystem, path = fsspec.url_to_fs(archive)
        if any(c in path for c in _MAGIC):
            head = path[: min(path.index(c) for c in _MAGIC if c in path)]
            root = head.rpartition("/")[0]
            matches = filesystem.glob(path, detail=True)
        elif filesystem.isfile(path):
            _require_suffix(path, archive)
            root = path.rpartition("/")[0]
            matches = {path: filesystem.info(path)}
        elif filesystem.exists(path):
            root = path
            matches = filesystem.find(path, detail=True)
        else:
            raise ArchiveError(f"no such file or folder: '{archive}'")
        yield from _remote_files(filesystem, matches, root)
    except ArchiveError:
        raise
    except ImportError as error:
        raise ArchiveError(f"cannot open '{archive}': {error}") from error
    except Exception as error:  # each file system has errors of its own
        raise ArchiveError(
            f"cannot search '{archive}': {type(error).__name__}: {error}. Check the URL, the "
            "network and the credentials"
        ) from error


def _remote_files(
    filesystem: AbstractFileSystem, matches: dict[str, dict[str, Any]], root: str
) -> Iterator[CheckpointFile]:
    pending = dict(matches)
    for name in sorted(pending):
        info = pending[name]
        if info.get("type") == "directory":
            yield from _remote_files(filesystem, filesystem.find(name, detail=True), root)
            continue
        below = name.removeprefix(root)
        hidden = any(part.startswith(".") for part in below.split("/"))
        if _is_checkpoint(name) and not hidden:
            yield CheckpointFile(
                uri=printable(filesystem.unstrip_protocol(name)),
                path=name,
                size=int(info.get("size") or 0),
                mtime=_mtime(info),
                folder=_folder(name, root),
                filesystem=filesystem,
            )


def _mtime(info: dict[str, Any]) -> float:
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


def _folder(path: str, root: str) -> str:
    parent = PurePosixPath(path).parent
    try:
        relative = parent.relative_to(PurePosixPath(Path(root).as_posix()))
    except ValueError:
        return parent.name
    return parent.name if str(relative) == "." else str(relative)


def _is_checkpoint(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _require_suffix(name: str, archive: str) -> None:
    if not _is_checkpoint(name):
        raise ArchiveError(
            f"'{archive}' is not a checkpoint: its name must end in {_or(SUFFIXES)}. Rename it, or "
            "save the weights with safetensors.torch.save_file"
        )


def _or(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}"
