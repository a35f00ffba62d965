"""One scoring run: what is left to do, what was done, what it came to."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.done import Done, FileKey, completed
from lipfast.scoring.engine import Engine
from lipfast.scoring.schema import Row
from lipfast.scoring.scorer import Scorer
from lipfast.scoring.selection import Selection
from lipfast.scoring.summary import Progress, Summary
from lipfast.scoring.write_behind import WriteBehind


class Run:
    """Counts what a run does.

    Args:
        summary: where the counts go.
        scorer: says what a score depends on.
        selection: which checkpoints.
        limit: at most so many; None for all.
        progress: called after every batch.
        retry_failed: do those again whose failure would repeat itself.
    """

    def __init__(
        self,
        summary: Summary,
        scorer: Scorer,
        selection: Selection,
        *,
        limit: int | None = None,
        progress: Callable[[Progress], None] | None = None,
        retry_failed: bool = False,
    ) -> None:
        self._summary, self._scorer, self._selection = summary, scorer, selection
        self._limit, self._progress, self._retry_failed = limit, progress, retry_failed
        self._done = Done()
        self._settled: set[FileKey] = set()
        self._reasons: Counter[str] = Counter()
        self._plans: set[str] = set()
        self._total = 0

    @property
    def finished(self) -> bool:
        """Whether the limit is reached."""
        return self._limit is not None and self._finished >= self._limit

    @property
    def _finished(self) -> int:
        return self._summary.scored + self._summary.failed

    def open(self, out: str | os.PathLike[str]) -> None:
        """Find out what the store has already."""
        self._done = completed(out)

    def left(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Leave out what the selection, the store or this run have settled."""
        chosen = self._selection.chosen(files)
        self._summary.found = len(files)
        self._summary.left_out = len(files) - len(chosen)
        todo = [file for file in chosen if not self._is_settled(file)]
        if self._limit is not None and not self._selection.needs_reading(todo):
            todo = todo[: self._limit - self._finished]
        return todo

    def _is_settled(self, file: CheckpointFile) -> bool:
        key = (file.uri, file.size, file.mtime)
        if key in self._settled:
            return True
        if self._done.is_scored(file, self._scorer.fingerprint):
            self._summary.skipped += 1
        elif not self._retry_failed and self._done.has_failed(file, self._scorer.fingerprint):
            self._summary.failed_before += 1
        else:
            return False
        self._settled.add(key)
        return True

    def score(
        self, files: Sequence[CheckpointFile], engine: Engine, store: WriteBehind | None
    ) -> None:
        """Score files, count and store their rows."""
        self._settled.update((file.uri, file.size, file.mtime) for file in files)
        self._total = self._finished + len(files)
        with closing(engine.run(files)) as batches:
            for batch in batches:
                rows = batch
                if self._limit is not None:
                    rows = rows[: self._limit - self._finished]
                if store is not None:
                    store.append(rows)
                self._count(rows)
                self._report()
                if self.finished:
                    break

    def close(self, engine: Engine) -> None:
        """Complete the summary."""
        summary = self._summary
        summary.left_out += engine.left_out
        summary.reasons = dict(self._reasons.most_common())
        summary.examples = {kind: summary.examples[kind] for kind in summary.reasons}
        summary.plans = len(self._plans)
        summary.workers = engine.workers
        summary.seconds.update(engine.seconds)

    def _count(self, rows: Sequence[Row]) -> None:
        summary = self._summary
        for row in rows:
            read = summary.seconds.get("read", 0.0) + row["seconds_read"]
            summary.seconds["read"] = read
            if row["status"] == "ok":
                summary.scored += 1
                self._plans.add(row["fingerprint"])
                continue
            summary.failed += 1
            self._reasons[row["kind"]] += 1
            reason = row["error"].removeprefix(f"{row['uri']}: ")
            summary.examples.setdefault(row["kind"], f"{row['uri']}: {reason}")

    def _report(self) -> None:
        if self._progress is not None:
            summary = self._summary
            done, total = self._finished, max(self._total, self._finished)
            self._progress(Progress(done, total, summary.failed, summary.skipped))
