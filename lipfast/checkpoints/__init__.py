"""Checkpoints: find them in an archive, read their weights and their metadata."""

from __future__ import annotations

from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Metadata, parse_value
from lipfast.checkpoints.names import SUFFIXES
from lipfast.checkpoints.pattern import Pattern
from lipfast.checkpoints.reader import Checkpoint, read_checkpoint
from lipfast.checkpoints.source import find_checkpoints

__all__ = [
    "SUFFIXES",
    "Checkpoint",
    "CheckpointFile",
    "Metadata",
    "Pattern",
    "find_checkpoints",
    "parse_value",
    "read_checkpoint",
]
