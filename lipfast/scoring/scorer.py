"""Score checkpoints: group them by plan, bound many in one call, turn the bounds into rows."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from lipfast._clock import clocked
from lipfast._native import capability
from lipfast._version import __version__
from lipfast.checkpoints import Checkpoint, CheckpointFile, Metadata, read_checkpoint
from lipfast.checkpoints.metadata import Value
from lipfast.checkpoints.text import to_utf8
from lipfast.errors import (
    ArgumentError,
    CheckpointError,
    LipfastError,
    NonFiniteError,
    StateDictError,
    TraceError,
    UnreachableError,
    UnsupportedOpError,
)
from lipfast.estimators.estimate import LowerBound, UpperBound, check_order
from lipfast.estimators.plan import Plan
from lipfast.estimators.upper.spectral_product import Vectors, upper_bounds
from lipfast.rules.registry import Norm
from lipfast.scoring.architectures import Architecture, ArchSource, Arguments
from lipfast.scoring.budget import BudgetError, elements_allowed
from lipfast.scoring.data import Samples
from lipfast.scoring.done import MISMATCH, NON_FINITE, UNREADABLE
from lipfast.scoring.fit import fitted
from lipfast.scoring.schema import LAYER, Row

METHOD = 1
"""Changes when the same checkpoint, plan and options would give other scores than before."""

_TIMED = 8  # checkpoints of each plan that a dry run times

_KINDS: dict[type[Exception], str] = {
    ArgumentError: "architecture or data does not fit",
    BudgetError: "metadata asks for a far larger model",
    CheckpointError: UNREADABLE,
    UnreachableError: "cannot be reached",
    NonFiniteError: NON_FINITE,
    StateDictError: MISMATCH,
    TraceError: "architecture cannot be traced",
    UnsupportedOpError: "architecture holds an op without a rule",
}


@dataclass(frozen=True)
class Options:
    """What changes the scores, and how many checkpoints share a call.

    Attributes:
        norm: 1, 2 or inf.
        seed: seed of the start vectors.
        batch_size: checkpoints of one plan per call.
        memory: bytes of intermediate results to hold at most.
        prefix: of the names that belong to the architecture; None finds it out.
    """

    norm: Norm = 2
    seed: int = 0
    batch_size: int = 64
    memory: int = 1 << 30
    prefix: str | None = None


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
    arch_args: Mapping[str, Value] | None
    samples: Samples
    options: Options

    def scorer(self, *, bounds: bool = True) -> Scorer:
        """Make a scorer.

        Raises:
            ArgumentError: the architecture cannot be imported or read.
        """
        architecture = Architecture(self.arch, self.arch_args)
        return Scorer(architecture, self.samples, self.options, bounds)


@dataclass(frozen=True)
class Reading:
    """A checkpoint that was read, or the reason why it could not be.

    Attributes:
        file: the file.
        checkpoint: its content; None when reading failed.
        error: the reason; empty when reading succeeded.
        seconds: what the reading took.
    """

    file: CheckpointFile
    checkpoint: Checkpoint | None
    error: LipfastError | None
    seconds: float


def read(file: CheckpointFile) -> Reading:
    """Read a checkpoint; a failure is part of the answer. May be called from any thread."""
    started = time.perf_counter()
    checkpoint, reason = None, None
    try:
        checkpoint = read_checkpoint(file)
    except LipfastError as error:
        reason = error
    except Exception as error:  # one bad file must not end a run over thousands
        reason = LipfastError(f"{file.uri}: {type(error).__name__}: {error}")
    return Reading(file, checkpoint, reason, time.perf_counter() - started)


_Member = tuple[Reading, Checkpoint]
_Failure = tuple[Reading, LipfastError]
_Groups = dict[Arguments, list[_Member]]


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
        plans: arguments of the architecture to how many checkpoints fitted.
        estimate: seconds that scoring would take; without bounds only.
    """

    architecture: Architecture
    samples: Samples
    options: Options
    bounds: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    plans: dict[Arguments, int] = field(default_factory=dict)
    estimate: float = 0.0

    def __post_init__(self) -> None:
        self._samples_as: dict[torch.dtype, Tensor] = {self.samples.x.dtype: self.samples.x}
        self._fingerprints: dict[Arguments, str] = {}
        self._rates: dict[Arguments, float] = {}  # seconds per checkpoint, in a dry run
        # Of the last batch of every plan: run -> singular vectors of its last checkpoint there.
        self._vectors: dict[Arguments, dict[str, Vectors]] = {}
        self._constants: Row = {
            "norm": float(self.options.norm),
            "seed": self.options.seed,
            "arch": self.architecture.name,
            "data": self.samples.name,
            "lipfast_version": __version__,
            "torch_version": str(torch.__version__),
            "capability": capability(),
        }

    def fingerprint(self, metadata: Mapping[str, Value], size: int) -> str | None:
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
        plans: dict[Arguments, Plan] = {}
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
    ) -> tuple[_Groups, list[_Failure], list[_Failure]]:
        """Part readings by arguments of the architecture; failures and misfits apart."""
        groups: _Groups = {}
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
        self, plan: Plan, arguments: Arguments, members: Sequence[_Member]
    ) -> tuple[list[_Member], list[Row]]:
        """Take the names that belong to the plan; rows for checkpoints where that is unclear."""
        good: list[_Member] = []
        rows: list[Row] = []
        for reading, checkpoint in members:
            try:
                state_dict = dict(fitted(checkpoint.state_dict, plan, self.options.prefix))
                good.append((reading, replace(checkpoint, state_dict=state_dict)))
            except StateDictError as error:  # noqa: PERF203 (one bad one must not end the run)
                rows.append(self._error_row(reading, error, arguments))
        return good, rows

    def _score_batch(
        self, plan: Plan, arguments: Arguments, members: Sequence[_Member], failed: list[Row]
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
            return rows + [self._row(reading, arguments, status="ok") for reading, _ in good]
        if len(good) < len(members):
            return self._score_batch(plan, arguments, good, rows)
        return rows + [self._bound_alone(plan, arguments, member) for member in good]

    def _estimate(self, plan: Plan, arguments: Arguments, members: Sequence[_Member]) -> None:
        """Add the time that scoring would take, by that of a few checkpoints of each plan."""
        self.plans[arguments] = self.plans.get(arguments, 0) + len(members)
        few = members[:_TIMED]
        if few and arguments not in self._rates:
            with suppress(Exception):  # what fails takes no time
                self._bound(plan, arguments, few[:1])  # the first call is slower
                started = time.perf_counter()
                self._bound(plan, arguments, few)
                self._rates[arguments] = (time.perf_counter() - started) / len(few)
        self.estimate += self._rates.get(arguments, 0.0) * len(members)

    def _check(
        self, plan: Plan, arguments: Arguments, members: Sequence[_Member]
    ) -> tuple[list[_Member], list[Row]]:
        """Part a batch into the checkpoints that fit the plan, and rows for those that do not."""
        rows: list[Row] = []
        good: list[_Member] = []
        started = time.perf_counter()
        for reading, checkpoint in members:
            try:
                plan.check(checkpoint.state_dict)
                good.append((reading, checkpoint))
            except Exception as error:  # noqa: PERF203 (one bad one must not end the run)
                rows.append(self._error_row(reading, error, arguments))
        self._count("check", started)
        return good, rows

    def _bound_alone(self, plan: Plan, arguments: Arguments, member: _Member) -> Row:
        try:
            return self._bound(plan, arguments, [member])[0]
        except Exception as error:  # not foreseen: the row says what, and the run goes on
            return self._error_row(member[0], error, arguments)

    def _bound(self, plan: Plan, arguments: Arguments, members: Sequence[_Member]) -> list[Row]:
        inside: Counter[str] = Counter()
        with clocked(inside):
            rows = self._bound_rows(plan, arguments, members)
        self.seconds["ops"] = self.seconds.get("ops", 0.0) + sum(inside.values())
        return rows

    def _bound_rows(
        self, plan: Plan, arguments: Arguments, members: Sequence[_Member]
    ) -> list[Row]:
        options = self.options
        started = time.perf_counter()
        state_dicts = plan.checked([checkpoint.state_dict for _, checkpoint in members])
        # Batches are in the order of runs and steps: a run that goes on from the batch before
        # starts from its last checkpoint there. Within a batch that would take several calls.
        runs = [checkpoint.metadata.run for _, checkpoint in members]
        known = self._vectors.get(arguments, {})
        uppers, vectors = upper_bounds(
            plan,
            state_dicts,
            norm=options.norm,
            seed=options.seed,
            start=[known.get(run) for run in runs],
        )
        self._vectors[arguments] = dict(zip(runs, vectors, strict=True))
        seconds_upper = self._count("upper", started)
        started = time.perf_counter()
        lowers = plan.lower(
            state_dicts,
            self._x(plan.dtype),
            norm=options.norm,
            memory=options.memory,
            progress=False,
        )
        seconds_lower = self._count("lower", started)
        started = time.perf_counter()
        shares = {
            "seconds_upper": seconds_upper / len(members),
            "seconds_lower": seconds_lower / len(members),
        }
        rows = [
            self._bounds_row(reading, arguments, upper, lower, shares)
            for (reading, _), upper, lower in zip(members, uppers, lowers, strict=True)
        ]
        self._count("rows", started)
        return rows

    def _bounds_row(
        self,
        reading: Reading,
        arguments: Arguments,
        upper: UpperBound,
        lower: LowerBound,
        shares: Mapping[str, float],
    ) -> Row:
        try:
            check_order(lower, upper)
        except LipfastError as error:
            return self._error_row(reading, error, arguments)
        return self._row(
            reading,
            arguments,
            status="ok",
            upper=upper.value,
            log_upper=upper.log_value,
            upper_certified=upper.certified,
            lower=lower.value,
            lower_certified=lower.certified,
            lower_sample=lower.sample,
            jacobian_max=lower.jacobian.value,
            mean=lower.mean,
            rms=lower.rms,
            samples=lower.samples,
            layers=[_layer(layer) for layer in upper.layers],
            **shares,
        )

    def _error_row(
        self, reading: Reading, error: Exception, arguments: Arguments | None = None
    ) -> Row:
        reason = str(error) or "no reason given"
        if not isinstance(error, LipfastError):
            reason = f"{type(error).__name__}: {reason}"
        kind = _KINDS.get(type(error), type(error).__name__)
        return self._row(reading, arguments, status="error", error=to_utf8(reason), kind=kind)

    def _row(self, reading: Reading, arguments: Arguments | None, **values: Any) -> Row:
        file = reading.file
        known = reading.checkpoint is not None
        metadata = (
            reading.checkpoint.metadata if reading.checkpoint else Metadata(file.extra, file.run)
        )
        return {
            "uri": file.uri,
            "size": file.size,
            "mtime": file.mtime,
            "run": to_utf8(metadata.run),
            "step": metadata.step,
            "epoch": metadata.epoch,
            "seconds_read": reading.seconds,
            "scored_at": datetime.now(timezone.utc),
            "fingerprint": self._fingerprint(arguments),
            "metadata": metadata.to_json() if known else None,
            **self._constants,
            **values,
        }

    def _fingerprint(self, arguments: Arguments | None) -> str:
        if arguments is None:  # no plan: what was asked for is all there is
            return self._hash(self.architecture.name)
        found = self._fingerprints.get(arguments)
        if found is None:
            found = self._hash(self._plan(arguments, 0).fingerprint)
            self._fingerprints[arguments] = found
        return found

    def _hash(self, plan: str) -> str:
        options = self.options
        parts: tuple[object, ...] = (
            METHOD,
            plan,
            float(options.norm),
            options.seed,
            self.samples.digest,
        )
        parts += () if options.prefix is None else (options.prefix,)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _plan(self, arguments: Arguments, size: int) -> Plan:
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
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        return seconds


def _layer(layer: Any) -> Row:
    return {field.name: getattr(layer, field.name) for field in LAYER}
