"""Checkpoints: find them in an archive, read their weights and their metadata."""

from __future__ import annotations

from lipfast.checkpoints.metadata import Metadata, parse_value
from lipfast.checkpoints.reader import Checkpoint, read_checkpoint
from lipfast.checkpoints.source import SUFFIXES, CheckpointFile, find_checkpoints

__all__ = [
    "SUFFIXES",
    "Checkpoint",
    "CheckpointFile",
    "Metadata",
    "find_checkpoints",
    "parse_value",
    "read_checkpoint",
]
