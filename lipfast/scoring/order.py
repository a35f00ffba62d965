"""The order of work: runs side by side, so that each checkpoint starts from its predecessor."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from lipfast.checkpoints import CheckpointFile, Metadata
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.pattern import customary

_DIGITS = re.compile(r"(\d+)")


def by_run(files: Sequence[CheckpointFile]) -> list[list[CheckpointFile]]:
    """Part files by run, each in the order of its steps as far as paths and manifests say them."""
    runs: dict[str, list[CheckpointFile]] = {}
    for file in files:
        runs.setdefault(file.run, []).append(file)
    return [sorted(run, key=_position) for run in runs.values()]


def interleaved(files: Sequence[CheckpointFile], batch: int) -> list[CheckpointFile]:
    """Order files so that consecutive batches hold the same runs, a few steps further on.

    The scorer starts a checkpoint from the singular vectors that its run had in the batch before.
    A batch of one run alone would start all but its first checkpoint from a distant one, or from
    none; with as many runs side by side as a batch has places, only the first checkpoint of a run
    starts cold.

    Args:
        files: in any order.
        batch: checkpoints per call.
    """
    waiting = deque(deque(run) for run in by_run(files))
    lanes = max(1, min(len(waiting), batch))
    depth = max(1, batch // lanes)
    active: list[deque[CheckpointFile]] = []
    ordered: list[CheckpointFile] = []
    while active or waiting:
        while waiting and len(active) < lanes:
            active.append(waiting.popleft())
        for run in active:
            ordered += [run.popleft() for _ in range(min(depth, len(run)))]
        active = [run for run in active if run]
    return ordered


def pieces(files: Sequence[CheckpointFile], size: int) -> Iterator[list[CheckpointFile]]:
    """Cut an archive into pieces of about `size` files; a run is cut only if it is longer."""
    piece: list[CheckpointFile] = []
    for run in by_run(files):
        for start in range(0, len(run), size):
            part = run[start : start + size]
            if piece and len(piece) + len(part) > size:
                yield piece
                piece = []
            piece = piece + part
    if piece:
        yield piece


def every(files: Sequence[CheckpointFile], step: int) -> list[CheckpointFile]:
    """Keep the first checkpoint of each run, and every `step`-th after it."""
    if step == 1:
        return list(files)
    kept = {file.uri for run in by_run(files) for file in run[::step]}
    return [file for file in files if file.uri in kept]


def _position(file: CheckpointFile) -> tuple[float, list[str], str]:
    path = file.path
    folder, _, name = path.rpartition("/")
    step = _step_of(name) if not file.extra else _step_beside(name, file.extra)
    *above, last = _natural(folder)
    first, *rest = _natural(name)
    natural = [*above, f"{last}/{first}", *rest]  # of the path, of which many files share the parts
    return (float("-inf") if step is None else step), natural, file.uri


@lru_cache(maxsize=1 << 12)
def _step_of(name: str) -> int | None:
    return Metadata(customary(name)).step


def _step_beside(name: str, extra: Mapping[str, Scalar]) -> int | None:
    return Metadata({**customary(name), **extra}).step


@lru_cache(maxsize=1 << 12)
def _natural(text: str) -> list[str]:
    """A key to sort by: numbers count as numbers."""
    return [part.zfill(20) if part.isdecimal() else part for part in _DIGITS.split(text)]
