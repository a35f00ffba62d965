"""The state of a group in the middle of training, in one file: what an exact resumption needs."""

from __future__ import annotations

import dataclasses
import io
import pickle
import time
from pathlib import Path
from typing import Any

import torch

from experiments.files import write_whole
from experiments.train.networks import LogRow, Metrics, Network

_SAVE_SECONDS = 20.0


class ResumeFile:
    """Saves the state of a group now and then; a reader never sees half a file.

    Args:
        path: of the file; its folder exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed since the last saving."""
        return time.monotonic() - self._saved >= _SAVE_SECONDS

    def save(self, state: dict[str, Any], rows: list[LogRow]) -> None:
        """Write the state: tensors, numbers and containers of them."""
        content = io.BytesIO()
        torch.save({**state, "rows": [dataclasses.astuple(row) for row in rows]}, content)
        write_whole(self.path, content.getvalue())
        self._saved = time.monotonic()

    def load(self) -> tuple[dict[str, Any], list[LogRow]] | None:
        """Read what was saved; None where there is nothing, or nothing readable."""
        try:
            state = torch.load(self.path, weights_only=True)
            rows = [
                LogRow(Network(*network), step, lr, Metrics(*metrics), *rest)
                for network, step, lr, metrics, *rest in state.pop("rows")
            ]
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError):
            return None
        return state, rows

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
