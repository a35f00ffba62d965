"""Metadata from JSON files beside a checkpoint."""

from __future__ import annotations

from typing import Any

from lipfast.checkpoints.access import read_json
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.scalars import scalars
from lipfast.errors import CheckpointError

MAX_BYTES = 8 << 20
"""Larger sidecars are refused: parsed JSON takes many times the memory of its text."""


def sidecar_metadata(file: CheckpointFile) -> dict[str, Scalar]:
    """Read all sidecars of a checkpoint; more specific ones go before those of the folder.

    Taken are numbers, texts and booleans, those below `config`, `hparams`, `metrics` ... included,
    and of a trainer's `log_history` the last entry.

    Raises:
        CheckpointError: a sidecar is too large or not a JSON object.
    """
    found: dict[str, Scalar] = {}
    for path in reversed(file.sidecars):
        content = _parsed(file, path)
        history = content.get("log_history")
        if isinstance(history, list) and history and isinstance(history[-1], dict):
            found |= scalars(history[-1].items(), tensors=False)
        found |= scalars(content.items(), tensors=False)
    return found


def _parsed(file: CheckpointFile, path: str) -> dict[str, Any]:
    name = f"{file.uri}: its sidecar '{path.rpartition('/')[2]}'"
    content = read_json(file, path, MAX_BYTES, f"{name} is")
    if not isinstance(content, dict):
        raise CheckpointError(f"{name} holds no JSON object")
    return content
