"""Engines: where the work of a run is done."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Protocol

from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.schema import Row


class Engine(Protocol):
    """Turns checkpoints into rows."""

    left_out: int
    workers: int
    device: str

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by stage so far, summed over workers."""

    def run(self, files: Sequence[CheckpointFile]) -> Generator[list[Row], None, None]:
        """Yield the rows of the files, a batch at a time; each file once, in any order."""

    def close(self) -> None:
        """Release workers."""
