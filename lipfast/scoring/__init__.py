"""Scoring: bound every checkpoint of an archive and keep the scores in a store."""

from __future__ import annotations

from lipfast.scoring.pipeline import score
from lipfast.scoring.store import Verification, read_scores, verify_store
from lipfast.scoring.summary import Progress, Summary

__all__ = ["Progress", "Summary", "Verification", "read_scores", "score", "verify_store"]
