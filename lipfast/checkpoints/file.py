"""One checkpoint of an archive, found but not read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from fsspec import AbstractFileSystem

from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.names import DISTRIBUTED, is_index
from lipfast.checkpoints.pattern import is_level, run_folder


@dataclass(frozen=True)
class CheckpointFile:
    r"""One checkpoint of an archive, found but not read.

    Attributes:
        uri: what names it everywhere: protocol and absolute path, not percent-encoded
            (`file:///runs/w64/step100.safetensors`), as fsspec opens it. Control
            characters and bytes that are not UTF-8 are shown as `\xNN`.
        path: the path that `filesystem` opens; the operating system's path when that is None.
        size: bytes, those of all shards together.
        mtime: time of the last change, seconds since 1970; 0.0 where a file system has none.
        folder: the parent folder relative to the archive (the archive's own name for a checkpoint
            directly in it): the run's name where the metadata has none.
        filesystem: the fsspec file system; None for local files.
        sidecars: paths of JSON files with its metadata, most specific first.
        extra: metadata that is known without reading it, from a manifest or a pattern; it goes
            before what the file says.
        stored: bytes that it takes inside a compressed file; None elsewhere.
    """

    uri: str
    path: str
    size: int
    mtime: float
    folder: str
    filesystem: AbstractFileSystem | None = field(default=None, repr=False, compare=False)
    sidecars: tuple[str, ...] = field(default=(), repr=False, compare=False)
    extra: Mapping[str, Scalar] = field(default_factory=dict, repr=False, compare=False)
    stored: int | None = field(default=None, repr=False, compare=False)

    @property
    def suffix(self) -> str:
        """The file name's ending, in lower case; `.json` for the index of a sharded checkpoint."""
        return PurePosixPath(self.path).suffix.lower()

    @property
    def sharded(self) -> bool:
        """Whether `path` is the index of several shards."""
        return is_index(self.path)

    @property
    def distributed(self) -> bool:
        """Whether `path` is the index of a folder that `torch.distributed.checkpoint` wrote."""
        return self.path.rpartition("/")[2] == DISTRIBUTED

    @property
    def run(self) -> str:
        """The run's name, as far as it is known without reading the file."""
        return str(self.extra.get("run", run_folder(self.folder)))


def folder_of(path: str, root: str) -> str:
    """Return the parent folder relative to the root, or its own name directly below the root.

    Where all of this are levels that trainers add (`checkpoint-500`), it begins further up: with
    the name of the run, of which the root is but a part.

    Example:
        >>> folder_of("/a/bert/checkpoint-5/model.pt", "/a/bert"), folder_of("/a/w4/x.pt", "/a")
        ('bert/checkpoint-5', 'w4')
    """
    return _relative_folder(path[: path.rfind("/") + 1], root)


@lru_cache(maxsize=1024)  # an archive has many files in a folder
def _relative_folder(folder: str, root: str) -> str:
    parent = PurePosixPath(folder)
    top = PurePosixPath(Path(root).as_posix())
    try:
        relative = str(parent.relative_to(top))
    except ValueError:
        return parent.name
    found = parent.name if relative == "." else relative
    if not all(map(is_level, found.split("/"))):
        return found
    named = next((above for above in (parent, *parent.parents) if not is_level(above.name)), top)
    return str(parent.relative_to(named.parent)) if named.name else found
