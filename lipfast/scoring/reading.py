"""Read checkpoints; a failure is part of the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from lipfast.checkpoints import Checkpoint, CheckpointFile, read_checkpoint
from lipfast.errors import LipfastError


@dataclass(frozen=True)
class Reading:
    """A checkpoint that was read, or the reason why it could not be.

    Attributes:
        file: the file.
        checkpoint: its content; None when reading failed.
        error: the reason; empty when reading succeeded.
        seconds: what the reading took.
    """

    file: CheckpointFile
    checkpoint: Checkpoint | None
    error: LipfastError | None
    seconds: float


def read(file: CheckpointFile, prefix: str | None = None) -> Reading:
    """Read a checkpoint; a failure is part of the answer. May be called from any thread.

    Args:
        file: the checkpoint.
        prefix: of the network that is asked for, as for `read_checkpoint`.
    """
    started = time.perf_counter()
    checkpoint, reason = None, None
    try:
        checkpoint = read_checkpoint(file, prefix=prefix)
    except LipfastError as error:
        reason = error
    except Exception as error:  # one bad file must not end a run over thousands
        reason = LipfastError(f"{file.uri}: {type(error).__name__}: {error}")
    return Reading(file, checkpoint, reason, time.perf_counter() - started)
