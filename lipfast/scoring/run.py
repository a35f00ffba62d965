"""One scoring run: what is left to do, what was done, what it came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from lipfast.checkpoints import CheckpointFile
from lipfast.scoring.done import NOT_WEIGHTS, Done, FileKey
from lipfast.scoring.engine import Engine
from lipfast.scoring.schema import Row
from lipfast.scoring.scorer import Scorer
from lipfast.scoring.selection import Selection
from lipfast.scoring.summary import Progress, Summary
from lipfast.scoring.write_behind import WriteBehind

_NOTES = 5  # that a summary lists


@dataclass
class Run:
    """Counts what a run does.

    Attributes:
        summary: where the counts go.
        scorer: says what a score depends on.
        selection: which checkpoints.
        done: what the store has already.
        limit: at most so many; None for all.
        progress: called after every batch.
        retry_failed: do those again whose failure would repeat itself.
    """

    summary: Summary
    scorer: Scorer
    selection: Selection
    done: Done
    limit: int | None
    progress: Callable[[Progress], None] | None
    retry_failed: bool

    def __post_init__(self) -> None:
        self._settled: set[FileKey] = set()
        self._reasons: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._plans: set[str] = set()
        self._total = 0
        self._aside = 0

    @property
    def finished(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self._finished >= self.limit

    @property
    def _finished(self) -> int:
        return self.summary.scored + self.summary.failed

    def left(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Leave out what the selection, the store or this run have settled."""
        chosen = self.selection.chosen(files)
        self.summary.found = len(files)
        self.summary.left_out = len(files) - len(chosen)
        todo = [file for file in chosen if not self._is_settled(file)]
        if self.limit is not None and not self.selection.needs_reading(todo):
            todo = todo[: self.limit - self._finished]
        return todo

    def _is_settled(self, file: CheckpointFile) -> bool:
        key = (file.uri, file.size, file.mtime)
        if key in self._settled:
            return True
        if self.done.is_scored(file, self.scorer.fingerprint):
            self.summary.skipped += 1
        elif not self.retry_failed and self.done.has_failed(file, self.scorer.fingerprint):
            self.summary.failed_before += 1
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
                rows = [row for row in batch if row.get("kind") != NOT_WEIGHTS]
                self._aside += len(batch) - len(rows)
                self._total -= len(batch) - len(rows)
                if self.limit is not None:
                    rows = rows[: self.limit - self._finished]
                if store is not None:
                    store.append(rows)
                self._count(rows)
                self._report()
                if self.finished:
                    break

    def close(self, engine: Engine) -> None:
        """Complete the summary."""
        summary = self.summary
        summary.left_out += engine.left_out
        summary.found -= self._aside
        summary.aside += self._aside
        summary.reasons = dict(self._reasons.most_common())
        summary.examples = {kind: summary.examples[kind] for kind in summary.reasons}
        summary.noted = self._notes.total()
        summary.notes = dict(self._notes.most_common(_NOTES))
        summary.plans = len(self._plans)
        summary.workers = engine.workers
        summary.seconds.update(engine.seconds)

    def _count(self, rows: Sequence[Row]) -> None:
        summary = self.summary
        for row in rows:
            read = summary.seconds.get("read", 0.0) + row["seconds_read"]
            summary.seconds["read"] = read
            if row["status"] == "ok":
                summary.scored += 1
                self._plans.add(row["fingerprint"])
                if row.get("given"):
                    summary.given[row["given"]] = summary.given.get(row["given"], 0) + 1
                if row["note"]:
                    self._notes[row["note"]] += 1
                continue
            summary.failed += 1
            self._reasons[row["kind"]] += 1
            reason = row["error"].removeprefix(f"{row['uri']}: ")
            summary.examples.setdefault(row["kind"], f"{row['uri']}: {reason}")

    def _report(self) -> None:
        if self.progress is not None:
            summary = self.summary
            done, total = self._finished, max(self._total, self._finished)
            self.progress(Progress(done, total, summary.failed, summary.skipped))
