"""What a scoring run did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lipfast.checkpoints.unnamed import listed
from lipfast.text import counted, given_rules


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        done: checkpoints finished, failed ones included.
        total: checkpoints to do in this run.
        failed: how many of those done failed.
        skipped: checkpoints that the store had already.
    """

    done: int
    total: int
    failed: int
    skipped: int


@dataclass
class Summary:
    """What a scoring run did.

    Attributes:
        store: the store's folder.
        found: checkpoints in the archive.
        skipped: of these, how many the store had already.
        scored: of these, how many were scored (with `dry_run`: could be).
        failed: of these, how many failed in this run.
        failed_before: of these, how many failed in an earlier run and are not tried again.
        left_out: of these, how many `where` and `every` leave out.
        aside: files that hold states of optimizers, schedulers and the like: no checkpoints.
        not_looked_at: ending of names to how many further files of the archive have it: they are
            not called checkpoints, and hold none that torch or safetensors wrote.
        reasons: kind of failure to how often it occurred, the most frequent first.
        examples: kind of failure to its first occurrence, as `uri: reason`.
        given: ops whose rules a user wrote to how many bounds were proved given them.
        noted: of those scored, how many have a note: which of several networks in a file was taken,
            what was renamed, what was not used.
        notes: note to how often it occurred, the most frequent ones.
        plans: architectures, or sizes of one, among the checkpoints of this run.
        seconds: time by stage; `read` (summed over threads) and `write` overlap with the others,
            `wait` is how long scoring waited for reading, `ops` is the part of `upper` and `lower`
            inside the native ops `spectral_norms` and `chain_jacobian_norms`, `total` is the wall
            clock.
        estimate: seconds that scoring would take on this machine; for a dry run.
        dry_run: nothing was written.
        workers: that shared the work; stages are summed over them.
        device: that they computed on, and where it was not asked for by name, why.
    """

    store: str
    found: int = 0
    skipped: int = 0
    scored: int = 0
    failed: int = 0
    failed_before: int = 0
    left_out: int = 0
    aside: int = 0
    not_looked_at: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    noted: int = field(default=0, kw_only=True)
    notes: dict[str, int] = field(default_factory=dict, kw_only=True)
    given: dict[str, int] = field(default_factory=dict, kw_only=True)
    plans: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    estimate: float | None = None
    dry_run: bool = False
    workers: int = 1
    device: str = "cpu"

    @property
    def rate(self) -> float:
        """Checkpoints per second of wall-clock time, failed ones included."""
        total = self.seconds.get("total", 0.0)
        return (self.scored + self.failed) / total if total > 0 else 0.0

    @property
    def next(self) -> str:
        """What to type next."""
        if self.dry_run:
            return "the same command without --dry-run"
        failed = " --failed" if self.failed or self.failed_before else ""
        return f"lipfast store show {shlex.quote(self.store)}{failed}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        names = [field.name for field in fields(self)]
        names.insert(names.index("estimate"), "rate")
        return {name: getattr(self, name) for name in [*names, "next"]}

    def __str__(self) -> str:
        verb = "can be scored" if self.dry_run else "scored"
        lines = [
            f"{counted(self.found, 'checkpoint')}: {self.scored} {verb}, {self.skipped} already in "
            f"the store, {self.failed} failed",
            *self._left(),
        ]
        for ops, count in self.given.items():
            lines.append(f"  {count} bounded {given_rules(ops.split(', '))}")
        for kind, count in self.reasons.items():
            lines.append(f"  {count} failed: {kind}")
            if kind in self.examples:
                lines.append(f"    for instance {self.examples[kind]}")
        lines += [f"  {count} scored with a note: {note}" for note, count in self.notes.items()]
        if self.noted > sum(self.notes.values()):
            lines.append(f"  {self.noted} have a note in all: the store's column 'note'")
        if self.scored + self.failed:
            rate = f"{self.rate:.0f}" if self.rate >= 10 else f"{self.rate:.1f}"
            lines.append(
                f"{self.seconds['total']:.1f} s, {rate} checkpoints/s, "
                f"{counted(self.plans, 'architecture')} ({_stages(self.seconds)})"
            )
            lines += self._inside_ops()
        if self.device != "cpu":
            lines.append(f"device: {self.device}")
        if self.estimate is not None:
            lines.append(f"scoring them takes about {duration(self.estimate)} on this machine")
        lines += [] if self.dry_run else [f"store: {self.store}"]
        return "\n".join([*lines, f"next: {self.next}"])

    def _inside_ops(self) -> list[str]:
        """The share of the native ops in the time of all workers."""
        if self.dry_run or not self.seconds.get("ops"):
            return []
        share = self.seconds["ops"] / (self.seconds["total"] * self.workers)
        return [f"{share:.0%} of the time inside spectral_norms and chain_jacobian_norms"]

    def _left(self) -> list[str]:
        """What was neither scored nor failed nor there, and how to get it."""
        known = self.scored + self.skipped + self.failed + self.failed_before + self.left_out
        lines = []
        if self.failed_before:
            lines.append(f"  {self.failed_before} failed before: --retry-failed tries them again")
        if self.not_looked_at:
            lines.append(
                f"  {counted(sum(self.not_looked_at.values()), 'file')} not looked at, by the "
                f"endings of their names: {listed(self.not_looked_at)}"
            )
        if self.left_out:
            lines.append(f"  {self.left_out} left out by --where or --every")
        if self.aside:
            files = counted(self.aside, "file")
            lines.append(f"  {files} left aside: states of optimizers and the like, no weights")
        if self.found > known:
            lines.append(f"  {self.found - known} left: the same command goes on")
        return lines


def duration(seconds: float) -> str:
    """Write a time in the unit that fits.

    Example:
        >>> duration(0.25), duration(90), duration(7200)
        ('0.25 s', '1.5 min', '2 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return f"{seconds:.2g} s"


def _stages(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items() if name != "total")
