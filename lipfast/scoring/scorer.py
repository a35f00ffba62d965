"""Score checkpoints: group them by plan, bound many in one call, on the CPU or on a device."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor

from lipfast.checkpoints import Checkpoint
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import LipfastError
from lipfast.estimators.batch import batch_bounds
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.quadratic.certificate import Multipliers
from lipfast.estimators.upper.starts import StartVectors
from lipfast.plan.checked import StateDict, checked_all
from lipfast.scoring.architectures import ArchArguments, ModelFamily
from lipfast.scoring.budget import elements_allowed
from lipfast.scoring.data import Samples
from lipfast.scoring.device import Device, find_device
from lipfast.scoring.feed import Feed, Packing, Sent
from lipfast.scoring.fit import fitted
from lipfast.scoring.options import Options, method_of
from lipfast.scoring.reading import Reading
from lipfast.scoring.rows import RowMaker
from lipfast.scoring.schema import Row
from lipfast.text import first_line

_TIMED = 8  # checkpoints of each plan that a dry run times

_Member = tuple[Reading, Checkpoint]
_Start = TypeVar("_Start")
_Failure = tuple[Reading, LipfastError]
_ByArguments = dict[ArchArguments, list[_Member]]


@dataclass(frozen=True)
class _Batch:
    """Checkpoints of one plan that are bounded in one call, and rows of those that failed before.

    Attributes:
        plan: their architecture.
        arguments: of it.
        members: the checkpoints.
        failed: rows of others that were read with them.
    """

    plan: Plan
    arguments: ArchArguments
    members: list[_Member]
    failed: list[Row]


@dataclass
class Scorer:
    """Turns readings into rows of the store.

    Attributes:
        architecture: makes the plans.
        samples: where lower bounds are evaluated.
        options: norm, seed, batch size.
        bounds: compute bounds; False only reads, checks and estimates the time.
        device: where bounds are computed.
        seconds: time by stage so far: `wait`, `compile`, `check`, `upper`, `lower`, `rows`; and of
            this, under `ops`, inside the native ops `spectral_norms` and `chain_jacobian_norms`.
        estimate: seconds that scoring would take; without bounds only.
    """

    architecture: ModelFamily
    samples: Samples
    options: Options
    bounds: bool = True
    device: Device = field(default_factory=lambda: find_device("cpu"))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    estimate: float = 0.0

    def __post_init__(self) -> None:
        self._samples_as: dict[torch.dtype, Tensor] = {}
        self._fingerprints: dict[ArchArguments, str] = {}
        self._rates: dict[ArchArguments, float] = {}  # seconds per checkpoint, in a dry run
        # Of the last batch of every plan: run -> singular vectors of its last checkpoint there.
        self._vectors: dict[ArchArguments, dict[str, StartVectors]] = {}
        # The same for quadratic constraints.
        self._warm: dict[ArchArguments, dict[str, Multipliers | None]] = {}
        self._rows = RowMaker(self.architecture.name, self.samples.name, self.options)
        self._most: dict[ArchArguments, int] = {}  # checkpoints that fit the device's memory

    @property
    def batch_size(self) -> int:
        """Checkpoints of one plan per call at most."""
        return self.options.batch_size or self.device.batch_size

    def fingerprint(self, metadata: Mapping[str, Scalar], size: int) -> str | None:
        """Hash what a score depends on beside the weights: plan, options and data.

        Args:
            metadata: of a checkpoint.
            size: of its file, in bytes.

        Returns:
            The hash; None if there is no plan for a checkpoint with this metadata.
        """
        try:
            arguments = self.architecture.arguments(metadata)
            if arguments not in self._fingerprints:
                self._plan(arguments, size)
        except LipfastError:
            return None
        return self._fingerprint(arguments)

    def score(self, windows: Iterable[Sequence[Reading]]) -> Iterator[list[Row]]:
        """Yield the rows of readings, one list per batch; a failure is a row with its reason.

        Args:
            windows: readings that are parted by plan together.

        Raises:
            LipfastError: there is no plan for any of a window, nor was there one before: the
                architecture or the data is wrong, not the checkpoints.
            DeviceLostError: the device answers no more.
        """
        batches = (batch for readings in windows for batch in self._batches(readings))
        if self.device.is_cpu or not self.bounds:
            yield from map(self._scored, batches)
            return
        feed = Feed(self.device.place)
        try:
            yield from self._fed(feed, batches)
        finally:
            feed.close()

    def _batches(self, readings: Sequence[Reading]) -> Iterator[_Batch | list[Row]]:
        """Batches to be bounded, and rows of what cannot be."""
        groups, failed, misfits = self._grouped(readings)
        plans: dict[ArchArguments, Plan] = {}
        for arguments in sorted(groups, key=repr):
            size = max(reading.file.size for reading, _ in groups[arguments])
            try:
                plans[arguments] = self._plan(arguments, size)
            except LipfastError as error:
                misfits += [(reading, error) for reading, _ in groups[arguments]]
        if misfits and not self.architecture.compiled:
            # A stray file may come first; what most of them have is what is wrong.
            times = Counter(str(error) for _, error in misfits)
            raise max((error for _, error in misfits), key=lambda error: times[str(error)])
        if failed or misfits:
            yield [self._error_row(reading, error) for reading, error in failed + misfits]
        for arguments, plan in plans.items():
            members = groups[arguments]
            while members:
                size = max(reading.file.size for reading, _ in members)
                most = self.device.batch(self.batch_size, size)
                most = min(most, self._most.get(arguments, most))
                batch, members = members[:most], members[most:]
                yield _Batch(plan, arguments, *self._fitted(plan, arguments, batch))

    def _scored(self, batch: _Batch | list[Row]) -> list[Row]:
        return batch if isinstance(batch, list) else self._score_batch(batch)

    def _fed(self, feed: Feed, batches: Iterator[_Batch | list[Row]]) -> Iterator[list[Row]]:
        """Bound each batch on the device while the next is copied and the one after it packed."""
        packing: tuple[_Batch, Packing | None] | None = None
        sent: tuple[_Batch, Sent | None] | None = None
        for batch in chain(batches, (None, None)):
            if isinstance(batch, list):
                yield batch
                continue
            started, following = time.perf_counter(), None
            state_dicts = [] if batch is None else [own.state_dict for _, own in batch.members]
            later = (
                None if batch is None else (batch, feed.pack(state_dicts) if state_dicts else None)
            )
            if packing is not None:
                following = (packing[0], self._sent(feed, packing[1]))
            packing = later
            self._count("copy", started)
            if sent is not None:
                yield self._score_batch(*sent)
            sent = following

    def _sent(self, feed: Feed, packing: Packing | None) -> Sent | None:
        """The copy of a batch; None where the weights have to go one by one, with their errors."""
        if packing is None:
            return None
        try:
            return feed.send(packing)
        except Exception as error:
            self.device.check_alive(error)
            return None

    def failed(self, reading: Reading) -> Row:
        """Return the row of a checkpoint that could not be read."""
        return self._error_row(reading, reading.error or LipfastError("not read"))

    def _grouped(
        self, readings: Sequence[Reading]
    ) -> tuple[_ByArguments, list[_Failure], list[_Failure]]:
        """Part readings by arguments of the architecture; failures and misfits apart."""
        groups: _ByArguments = {}
        failed: list[_Failure] = []
        misfits: list[_Failure] = []
        for reading in readings:
            checkpoint = reading.checkpoint
            if checkpoint is None:
                failed.append((reading, reading.error or LipfastError("not read")))
                continue
            try:
                arguments = self.architecture.arguments(checkpoint.metadata.values)
                groups.setdefault(arguments, []).append((reading, checkpoint))
            except LipfastError as error:
                misfits.append((reading, error))
        return groups, failed, misfits

    def _fitted(
        self, plan: Plan, arguments: ArchArguments, members: Sequence[_Member]
    ) -> tuple[list[_Member], list[Row]]:
        """Take the names that belong to the plan; rows for checkpoints where that is unclear."""

        def named(checkpoint: Checkpoint) -> Checkpoint:
            return fitted(checkpoint, plan, self.options.prefix)

        return self._parted(arguments, members, named)

    def _parted(
        self,
        arguments: ArchArguments,
        members: Sequence[_Member],
        work: Callable[[Checkpoint], Checkpoint],
    ) -> tuple[list[_Member], list[Row]]:
        """Do something to every checkpoint; rows for those where it fails."""
        good: list[_Member] = []
        rows: list[Row] = []
        for reading, checkpoint in members:
            try:
                done = work(checkpoint)
                own = reading if done is checkpoint else replace(reading, checkpoint=done)
                good.append((own, done))
            except Exception as error:  # noqa: PERF203 (one bad one must not end the run)
                rows.append(self._error_row(reading, error, arguments))
        return good, rows

    def _score_batch(self, batch: _Batch, sent: Sent | None = None) -> list[Row]:
        """Score a batch in one call; if that fails, without those to blame, else one by one.

        Args:
            batch: what to score.
            sent: its weights on the device, where they went there together.
        """
        plan, arguments, members = batch.plan, batch.arguments, batch.members
        if not members:
            return batch.failed
        if not self.bounds:
            return self._looked_at(batch)
        try:
            return batch.failed + self._bound(plan, arguments, members, sent)
        except torch.OutOfMemoryError as error:
            lacking: str | None = first_line(error)
        except Exception as error:
            self.device.check_alive(error)
            lacking, problem = None, error
        if lacking is None:
            return batch.failed + self._one_by_one(batch, problem)
        del sent  # its memory is needed
        return batch.failed + self._halved(batch, lacking)

    def _one_by_one(self, batch: _Batch, problem: Exception) -> list[Row]:
        """Score a batch that failed without those that do not fit, or else each alone."""
        plan, arguments, members = batch.plan, batch.arguments, batch.members
        good, rows = self._check(plan, arguments, members)
        if len(good) < len(members):
            return rows + self._score_batch(_Batch(plan, arguments, good, []))
        if len(members) == 1:
            return [self._error_row(members[0][0], problem, arguments)]
        for member in members:
            rows += self._score_batch(_Batch(plan, arguments, [member], []))
        return rows

    def _halved(self, batch: _Batch, lacking: str) -> list[Row]:
        """Score a batch that the device has no memory for in two halves, and later ones alike."""
        self.device.release()
        plan, arguments, members = batch.plan, batch.arguments, batch.members
        if len(members) == 1:
            reading = members[0][0]
            error = self.device.too_small(reading.file.uri, lacking)
            return [self._error_row(reading, error, arguments)]
        half = len(members) // 2
        self._most[arguments] = min(half, self._most.get(arguments, half))
        parts = (members[:half], members[half:])
        return [
            row for part in parts for row in self._score_batch(_Batch(plan, arguments, part, []))
        ]

    def _looked_at(self, batch: _Batch) -> list[Row]:
        """Check a batch and estimate what scoring it would take."""
        good, rows = self._check(batch.plan, batch.arguments, batch.members)
        self._estimate(batch.plan, batch.arguments, good)
        fingerprint = self._fingerprint(batch.arguments)
        rows += [self._rows.readable(reading, fingerprint) for reading, _ in good]
        return batch.failed + rows

    def _estimate(self, plan: Plan, arguments: ArchArguments, members: Sequence[_Member]) -> None:
        """Add the time that scoring would take, by that of a few checkpoints of each plan."""
        few = members[:_TIMED]
        if few and arguments not in self._rates:
            with suppress(Exception):  # what fails takes no time
                self._bound(plan, arguments, few[:1])  # the first call is slower
                started = time.perf_counter()
                self._bound(plan, arguments, few)
                self._rates[arguments] = (time.perf_counter() - started) / len(few)
        self.estimate += self._rates.get(arguments, 0.0) * len(members)

    def _check(
        self, plan: Plan, arguments: ArchArguments, members: Sequence[_Member]
    ) -> tuple[list[_Member], list[Row]]:
        """Part a batch into the checkpoints that fit the plan, and rows for those that do not."""

        def checked(checkpoint: Checkpoint) -> Checkpoint:
            plan.check(checkpoint.state_dict)
            return checkpoint

        started = time.perf_counter()
        parted = self._parted(arguments, members, checked)
        self._count("check", started)
        return parted

    def _bound(
        self,
        plan: Plan,
        arguments: ArchArguments,
        members: Sequence[_Member],
        sent: Sent | None = None,
    ) -> list[Row]:
        """Bound checkpoints in one call; fails as a whole."""
        options, started = self.options, time.perf_counter()
        state_dicts = checked_all(plan, self._placed(members, sent))
        self._count("check", started)
        # Batches are in the order of runs and steps: a run that goes on from the batch before
        # starts from its last checkpoint there. Within a batch that would take several calls, and
        # on a device a pass over all matrices is less than what starts cost.
        starts = self._known(self._vectors, arguments, members) if self.device.is_cpu else None
        found = batch_bounds(
            plan,
            state_dicts,
            self._x(plan.dtype),
            norm=options.norm,
            seed=options.seed,
            start=starts,
            method=options.upper,
            warm=self._known(self._warm, arguments, members),
            memory=self.device.memory(options.memory),
        )
        last = {checkpoint.metadata.run: at for at, (_, checkpoint) in enumerate(members)}
        warm = {run: found.uppers.warm_start(at) for run, at in last.items()}
        self._warm[arguments] = warm
        if self.device.is_cpu:
            vectors = found.uppers.starts
            self._vectors[arguments] = {run: vectors[at] for run, at in last.items()}
        for stage, seconds in found.seconds.items():
            self.seconds[stage] += seconds
        started = time.perf_counter()
        shares = {
            f"seconds_{stage}": found.seconds[stage] / len(members) for stage in ("upper", "lower")
        }
        fingerprint = self._fingerprint(arguments)
        readings = [reading for reading, _ in members]
        rows = self._rows.bounded(readings, fingerprint, found.uppers, found.lowers, shares)
        self._count("rows", started)
        return rows

    def _known(
        self,
        before: Mapping[ArchArguments, Mapping[str, _Start]],
        arguments: ArchArguments,
        members: Sequence[_Member],
    ) -> list[_Start | None]:
        """What the runs of checkpoints had in the batch before."""
        known = before.get(arguments, {})
        return [known.get(checkpoint.metadata.run) for _, checkpoint in members]

    def _placed(self, members: Sequence[_Member], sent: Sent | None) -> Sequence[StateDict]:
        """State dicts on the device of this scorer."""
        if sent is not None:
            return sent.state_dicts()
        own = [checkpoint.state_dict for _, checkpoint in members]
        if self.device.is_cpu:
            return own
        return [{name: self.device.take(tensor) for name, tensor in entry.items()} for entry in own]

    def _error_row(
        self, reading: Reading, error: Exception, arguments: ArchArguments | None = None
    ) -> Row:
        return self._rows.failed(reading, self._fingerprint(arguments), error)

    def _fingerprint(self, arguments: ArchArguments | None) -> str:
        if arguments is None:  # no plan: what was asked for is all there is
            return self.options.fingerprint(self.architecture.name, self.samples.digest)
        found = self._fingerprints.get(arguments)
        if found is None:
            plan = self._plan(arguments, 0)
            digest = self.samples.digest
            found = self.options.fingerprint(plan.fingerprint, digest, method_of(plan))
            self._fingerprints[arguments] = found
        return found

    def _plan(self, arguments: ArchArguments, size: int) -> Plan:
        started = time.perf_counter()
        try:
            return self.architecture.plan(arguments, self.samples.x, elements_allowed(size))
        finally:
            self._count("compile", started)

    def _x(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._samples_as:
            self._samples_as[dtype] = self.device.take(self.samples.x.to(dtype))
        return self._samples_as[dtype]

    def _count(self, stage: str, started: float) -> float:
        seconds = time.perf_counter() - started
        self.seconds[stage] += seconds
        return seconds
