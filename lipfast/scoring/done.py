"""What a store holds already: which checkpoints a run may leave out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from lipfast._version import __version__
from lipfast.checkpoints import CheckpointFile, Metadata
from lipfast.checkpoints.metadata import Scalar
from lipfast.scoring.schema import READING, UNREADABLE, is_outdated
from lipfast.scoring.scores import read_rows
from lipfast.scoring.store import SCHEMA_FILE, parts, store_folder

FileKey: TypeAlias = "tuple[str, int, float]"
Attempt: TypeAlias = "tuple[str, str]"
Fingerprint: TypeAlias = "Callable[[Mapping[str, Scalar], int], str | None]"

NON_FINITE = "NaN or infinite weights"
MISMATCH = "state dict does not match the architecture"
NOT_WEIGHTS = "states of optimizers and the like, no weights"
"""What is left out, and counted: no row of the store."""

_DECODER = json.JSONDecoder()  # its `raw_decode` takes half as long as `json.loads`
_WILL_REPEAT = (UNREADABLE, NON_FINITE, MISMATCH)


@dataclass
class Done:
    """What a store holds.

    Attributes:
        scored: (uri, size, mtime) of a scored file to pairs (fingerprint, metadata as JSON).
        failed: the same of failed ones; those that will fail again as long as the file is the
            same have the fingerprint "".
        outdated: of scored files, the fingerprints of rows whose file may be read in another way
            now.
    """

    scored: dict[FileKey, list[Attempt]] = field(default_factory=dict)
    failed: dict[FileKey, list[Attempt]] = field(default_factory=dict)
    outdated: set[tuple[FileKey, str]] = field(default_factory=set)

    def is_scored(self, file: CheckpointFile, fingerprint: Fingerprint) -> bool:
        """Whether the store has the row that scoring the file now would give."""
        key = (file.uri, file.size, file.mtime)
        return any(
            (key, attempt[0]) not in self.outdated and _is_current(attempt, file, fingerprint)
            for attempt in self.scored.get(key, ())
        )

    def has_failed(self, file: CheckpointFile, fingerprint: Fingerprint) -> bool:
        """Whether the store says that scoring the file now would fail."""
        attempts = self.failed.get((file.uri, file.size, file.mtime), ())
        return any(not a[0] or _is_current(a, file, fingerprint) for a in attempts)


def _is_current(attempt: Attempt, file: CheckpointFile, fingerprint: Fingerprint) -> bool:
    stored, text = attempt
    metadata: dict[str, Any] = _DECODER.raw_decode(text)[0]
    if file.extra:  # a manifest or a pattern may say something else than it did then
        known = {key: metadata.get(key) for key in file.extra}
        if known != json.loads(Metadata(file.extra).to_json()):
            return False
    return stored == fingerprint(metadata, file.size)


def completed(path: str | os.PathLike[str]) -> Done:
    """Find what a store holds already.

    A failure counts only if it will repeat itself: the file cannot be read, or does not fit the
    plan, as this version of lipfast found. Files that could not be reached, and failures of the
    architecture, which may have been mended since, are tried again by every run. So are files that
    may be read in another way now than then, scored or not.

    Args:
        path: the store's folder.

    Returns:
        What is there; nothing when there is no store yet.

    Raises:
        StoreError: the store cannot be read; a corrupt part is named.
    """
    folder = store_folder(path)
    empty = folder.is_dir() and not (folder / SCHEMA_FILE).exists() and not parts(folder)
    if empty or not folder.exists():
        return Done()
    names = [
        *("uri", "size", "mtime", "status", "kind", "fingerprint", "metadata", "lipfast_version"),
        *("note", "reading"),
    ]
    table = read_rows(path, names)
    done = Done()
    columns = (table.column(name).to_pylist() for name in names)
    current: set[tuple[FileKey, str]] = set()
    for uri, size, mtime, status, kind, mark, metadata, version, note, reading in zip(
        *columns, strict=True
    ):
        attempt = ("" if kind == UNREADABLE else mark, metadata or "{}")
        key = (uri, size, mtime)
        if status == "ok":
            done.scored.setdefault(key, []).append(attempt)
            (done.outdated if is_outdated(uri, note, reading) else current).add((key, mark))
        elif version == __version__ and reading == READING and kind in _WILL_REPEAT:
            done.failed.setdefault(key, []).append(attempt)
    done.outdated -= current
    return done
