"""Files whose names do not say that they are checkpoints: taken by their content, or counted."""

from __future__ import annotations

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

from lipfast.checkpoints.content import (
    HEAD,
    foreign,
    foreign_zip,
    is_pickle,
    is_safetensors,
    is_torch,
)
from lipfast.checkpoints.names import (
    COMPANIONS,
    DISTRIBUTED,
    SUFFIXES,
    is_checkpoint,
    is_state_file,
)
from lipfast.errors import ArchiveError
from lipfast.text import alternatives, printable

# Endings that some give to files of torch.save, others to something else.
_OPEN = {
    *(".bin", ".pkl", ".pickle", ".model", ".weights", ".weight", ".params", ".state", ".states"),
    *(".t7", ".torch", ".pytorch", ".net", ".mdl", ".nn", ".dat", ".data", ".save", ".sd", ".tar"),
    *(
        ".zip",
        ".state_dict",
        ".statedict",
        ".chkpt",
        ".checkpoint",
        ".best",
        ".last",
        ".final",
        ".latest",
    ),
}
_HASH = re.compile(r"[0-9a-f]{32,}")  # a blob of a cache, which a named file links to
_MAX_ENDINGS = 12
_METADATA = (".json", ".jsonl", ".csv", ".yaml", ".yml", ".md", ".txt", ".log")


def is_open(name: str) -> bool:
    """Say whether a file of this name may hold weights, or something else.

    Example:
        >>> [is_open(name) for name in ("model.bin", "last", "ckpt.1000", "a.png", "optimizer.bin")]
        [True, True, True, False, False]
    """
    if name.startswith(".") or is_state_file(name) or _HASH.fullmatch(name):
        return False
    end = ending(name)
    return not end or end in _OPEN or end[1:].isdigit()


def ending(name: str) -> str:
    """The last part of a name with its dot, in lower case; none where it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (fast)


def holds_weights(path: str) -> bool:
    """Say whether a local file begins as those of torch.save or safetensors do."""
    with suppress(OSError):
        if stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 (fast)
            return _is_known(_head(path))
    return False


def taken_by_content(folder: str, names: Collection[str]) -> Iterator[str]:
    """Pick the files of a folder that hold weights although their names do not say so.

    Args:
        folder: where they are.
        names: of its files.
    """
    for name in sorted(names):
        if is_open(name) and not is_checkpoint(name) and holds_weights(f"{folder}/{name}"):
            yield name


def not_looked_at(names: Iterable[str], taken: Collection[str]) -> Iterator[str]:
    """Pick the files of a folder that are no checkpoints, settings or notes; states are none."""
    known = {*taken, *(COMPANIONS if DISTRIBUTED in taken else ())}
    for name in names:
        if is_state_file(name) or not (
            name in known or name.startswith(".") or ending(name) in _METADATA
        ):
            yield name


def by_ending(paths: Iterable[str]) -> dict[str, int]:
    """Count files by the endings of their names, the most frequent first, the rare ones together.

    Example:
        >>> by_ending(["a/x.h5", "a/y.h5", "b/LICENSE", "b/x.1"])
        {'.h5': 2, 'no ending': 1, 'a number': 1}
    """
    counts: Counter[str] = Counter()
    for path in paths:
        end = ending(path.rpartition("/")[2])
        counts["a number" if end[1:].isdigit() else printable(end) or "no ending"] += 1
    shown = dict(counts.most_common(_MAX_ENDINGS))
    rest = counts.total() - sum(shown.values())
    return shown | ({"others": rest} if rest else {})


def listed(counts: dict[str, int]) -> str:
    """Write such counts in one line.

    Example:
        >>> listed({".h5": 2, "no ending": 1})
        '.h5 2, no ending 1'
    """
    return ", ".join(f"{end} {count}" for end, count in counts.items())


def require_weights(name: str, archive: str, head: Callable[[], bytes]) -> None:
    """Refuse a file that was asked for by name, and neither is called a checkpoint nor holds one.

    Args:
        name: of the file.
        archive: as it was asked for.
        head: reads its first bytes.

    Raises:
        ArchiveError: says what it is.
    """
    if is_checkpoint(name):
        return
    start = head()
    if _is_known(start) or is_pickle(start):
        return
    what = foreign(start, len(start))
    if start.startswith(b"PK"):
        what = _zip_of(archive)
    expected = f"its name must end in {alternatives(SUFFIXES)}, or its content be weights of torch"
    advice = "Rename it, or save the weights with safetensors.torch.save_file"
    said = f"it is {what}" if what else advice
    raise ArchiveError(f"'{archive}' is not a checkpoint: {expected}; {said}")


def local_head(path: str) -> bytes:
    """The first bytes of a local file; none where it is a pipe or the like, which may block."""
    return _head(path) if stat.S_ISREG(os.stat(path).st_mode) else b""  # noqa: PTH116 (fast)


def _is_known(head: bytes) -> bool:
    return is_torch(head) or is_safetensors(head)


def _head(path: str) -> bytes:
    with open(path, "rb") as stream:  # noqa: PTH123 (fast)
        return stream.read(HEAD)


def _zip_of(archive: str) -> str | None:
    with suppress(OSError, zipfile.BadZipFile, ValueError), zipfile.ZipFile(archive) as opened:
        return foreign_zip(opened.namelist())
    return None
