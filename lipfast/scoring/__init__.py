"""Scoring: bound every checkpoint of an archive and keep the scores in a store."""

from __future__ import annotations

from lipfast.scoring.compact import Compaction, compact_store
from lipfast.scoring.export import export_scores
from lipfast.scoring.pipeline import Interrupted, score
from lipfast.scoring.scores import read_scores
from lipfast.scoring.summary import Progress, Summary
from lipfast.scoring.verify import Verification, verify_store

__all__ = [
    "Compaction",
    "Interrupted",
    "Progress",
    "Summary",
    "Verification",
    "compact_store",
    "export_scores",
    "read_scores",
    "score",
    "verify_store",
]
