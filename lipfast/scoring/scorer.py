"""Score checkpoints: group them by plan, bound many in one call."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lipfast._clock import clocked
from lipfast.checkpoints import Checkpoint
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import LipfastError
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.spectral_product import product_bounds
from lipfast.estimators.upper.starts import StartVectors
from lipfast.scoring.architectures import ArchArguments, ArchSource, ModelFamily
from lipfast.scoring.budget import elements_allowed
from lipfast.scoring.data import Samples
from lipfast.scoring.fit import fitted
from lipfast.scoring.options import Options, method_of
from lipfast.scoring.reading import Reading
from lipfast.scoring.rows import RowMaker
from lipfast.scoring.schema import Row

_TIMED = 8  # checkpoints of each plan that a dry run times

_Member = tuple[Reading, Checkpoint]
_Failure = tuple[Reading, LipfastError]
_ByArguments = dict[ArchArguments, list[_Member]]


@dataclass
class Scorer:
    """Turns readings into rows of the store.

    Attributes:
        architecture: makes the plans.
        samples: where lower bounds are evaluated.
        options: norm, seed, batch size.
        bounds: compute bounds; False only reads, checks and estimates the time.
        seconds: time by stage so far: `wait`, `compile`, `check`, `upper`, `lower`, `rows`; and of
            this, under `ops`, inside the native ops `spectral_norms` and `chain_jacobian_norms`.
        estimate: seconds that scoring would take; without bounds only.
    """

    architecture: ModelFamily
    samples: Samples
    options: Options
    bounds: bool = True
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    estimate: float = 0.0

    def __post_init__(self) -> None:
        self._samples_as: dict[torch.dtype, Tensor] = {self.samples.x.dtype: self.samples.x}
        self._fingerprints: dict[ArchArguments, str] = {}
        self._rates: dict[ArchArguments, float] = {}  # seconds per checkpoint, in a dry run
        # Of the last batch of every plan: run -> singular vectors of its last checkpoint there.
        self._vectors: dict[ArchArguments, dict[str, StartVectors]] = {}
        self._rows = RowMaker(self.architecture.name, self.samples.name, self.options)

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

    def score(self, readings: Sequence[Reading]) -> Iterator[list[Row]]:
        """Yield the rows of the readings, one list per batch; a failure is a row with its reason.

        Raises:
            LipfastError: there is no plan for any of them, nor was there one before: the
                architecture or the data is wrong, not the checkpoints.
        """
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
            for start in range(0, len(members), self.options.batch_size):
                batch = members[start : start + self.options.batch_size]
                yield self._score_batch(plan, arguments, *self._fitted(plan, arguments, batch))

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
                good.append((replace(reading, checkpoint=done), done))
            except Exception as error:  # noqa: PERF203 (one bad one must not end the run)
                rows.append(self._error_row(reading, error, arguments))
        return good, rows

    def _score_batch(
        self, plan: Plan, arguments: ArchArguments, members: Sequence[_Member], failed: list[Row]
    ) -> list[Row]:
        """Score a batch in one call; if that fails, without those to blame, else one by one."""
        if not members:
            return failed
        if self.bounds:
            with suppress(Exception):
                return failed + self._bound(plan, arguments, members)
        good, rows = self._check(plan, arguments, members)
        rows = failed + rows
        if not self.bounds:
            self._estimate(plan, arguments, good)
            fingerprint = self._fingerprint(arguments)
            return rows + [self._rows.readable(reading, fingerprint) for reading, _ in good]
        if len(good) < len(members):
            return self._score_batch(plan, arguments, good, rows)
        for member in good:
            try:
                rows += self._bound(plan, arguments, [member])
            except Exception as error:  # noqa: PERF203 (not foreseen: the row says what)
                rows.append(self._error_row(member[0], error, arguments))
        return rows

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

    def _bound(self, plan: Plan, arguments: ArchArguments, members: Sequence[_Member]) -> list[Row]:
        options, inside = self.options, Counter[str]()
        started = time.perf_counter()
        state_dicts = plan.checked([checkpoint.state_dict for _, checkpoint in members])
        # Batches are in the order of runs and steps: a run that goes on from the batch before
        # starts from its last checkpoint there. Within a batch that would take several calls.
        runs = [checkpoint.metadata.run for _, checkpoint in members]
        known = self._vectors.get(arguments, {})
        with clocked(inside):
            uppers, vectors = product_bounds(
                plan,
                state_dicts,
                norm=options.norm,
                seed=options.seed,
                start=[known.get(run) for run in runs],
            )
        self._vectors[arguments] = dict(zip(runs, vectors, strict=True))
        seconds_upper = self._count("upper", started)
        started = time.perf_counter()
        with clocked(inside):
            lowers = plan.lower(
                state_dicts,
                self._x(plan.dtype),
                norm=options.norm,
                memory=options.memory,
                progress=False,
            )
        seconds_lower = self._count("lower", started)
        self.seconds["ops"] += sum(inside.values())
        started = time.perf_counter()
        shares = {
            "seconds_upper": seconds_upper / len(members),
            "seconds_lower": seconds_lower / len(members),
        }
        fingerprint = self._fingerprint(arguments)
        rows = [
            self._rows.bounded(reading, fingerprint, upper, lower, shares)
            for (reading, _), upper, lower in zip(members, uppers, lowers, strict=True)
        ]
        self._count("rows", started)
        return rows

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
            self._samples_as[dtype] = self.samples.x.to(dtype)
        return self._samples_as[dtype]

    def _count(self, stage: str, started: float) -> float:
        seconds = time.perf_counter() - started
        self.seconds[stage] += seconds
        return seconds


@dataclass(frozen=True)
class Recipe:
    """What makes a scorer, here or in another process.

    Attributes:
        arch: what makes the models.
        arch_args: keyword arguments that go before the metadata.
        samples: where lower bounds are evaluated.
        options: norm, seed, batch size.
    """

    arch: ArchSource
    arch_args: Mapping[str, Scalar] | None
    samples: Samples
    options: Options

    def scorer(self, *, bounds: bool = True) -> Scorer:
        """Make a scorer.

        Raises:
            ArgumentError: the architecture cannot be imported or read.
        """
        architecture = ModelFamily(self.arch, self.arch_args)
        return Scorer(architecture, self.samples, self.options, bounds)
