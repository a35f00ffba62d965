"""Score checkpoints: group them by plan, bound many in one call, turn the bounds into rows."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

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
    UnsupportedOpError,
)
from lipfast.estimators.estimate import LowerBound, UpperBound, check_order
from lipfast.estimators.spectral_product import upper_bounds
from lipfast.plan.plan import Plan
from lipfast.rules.registry import Norm
from lipfast.scoring.architectures import Architecture, Arguments
from lipfast.scoring.data import Samples
from lipfast.scoring.store import VERSION, Row

_KINDS: dict[type[Exception], str] = {
    ArgumentError: "architecture or data does not fit",
    CheckpointError: "cannot be read",
    NonFiniteError: "NaN or infinite weights",
    StateDictError: "state dict does not match the architecture",
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
    """

    norm: Norm = 2
    seed: int = 0
    batch_size: int = 64
    memory: int = 1 << 30


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


@dataclass
class Scorer:
    """Turns readings into rows of the store.

    Attributes:
        architecture: makes the plans.
        samples: where lower bounds are evaluated.
        options: norm, seed, batch size.
        bounds: compute bounds; False only reads and checks.
        seconds: time by stage so far: `compile`, `check`, `upper`, `lower`, `rows`.
        reasons: kind of failure to how often it occurred.
        examples: kind of failure to its first occurrence, as `uri: reason`.
    """

    architecture: Architecture
    samples: Samples
    options: Options
    bounds: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._samples_as: dict[torch.dtype, Tensor] = {self.samples.x.dtype: self.samples.x}
        self._fingerprints: dict[Arguments, str] = {}
        # Of the last batch of every plan: run -> singular vectors of its last checkpoint there.
        self._vectors: dict[Arguments, dict[str, Mapping[str, Tensor]]] = {}
        self._constants: Row = {
            "norm": float(self.options.norm),
            "seed": self.options.seed,
            "arch": self.architecture.name,
            "data": self.samples.name,
            "lipfast_version": __version__,
            "torch_version": str(torch.__version__),
            "capability": capability(),
        }

    def fingerprint(self, metadata: Mapping[str, Value]) -> str:
        """Hash what a score depends on beside the weights: plan, options and data.

        Raises:
            LipfastError: there is no plan for a checkpoint with this metadata.
        """
        return self._fingerprint(self.architecture.arguments(metadata))

    def score(self, readings: Sequence[Reading]) -> Iterator[list[Row]]:
        """Yield the rows of the readings, one list per batch; a failure is a row with its reason.

        Raises:
            LipfastError: there is no plan for any of them, nor was there one before: the
                architecture or the data is wrong, not the checkpoints.
        """
        groups: dict[Arguments, list[tuple[Reading, Checkpoint]]] = {}
        failed: list[tuple[Reading, LipfastError]] = []
        misfits: list[tuple[Reading, LipfastError]] = []
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
        plans: dict[Arguments, Plan] = {}
        for arguments in sorted(groups, key=repr):
            try:
                plans[arguments] = self._plan(arguments)
            except LipfastError as error:  # noqa: PERF203
                misfits += [(reading, error) for reading, _ in groups[arguments]]
        if misfits and not self.architecture.compiled:
            # A stray file may come first; what most of them have is what is wrong.
            times = Counter(str(error) for _, error in misfits)
            raise max((error for _, error in misfits), key=lambda error: times[str(error)])
        if failed or misfits:
            yield [self._error_row(reading, error) for reading, error in failed + misfits]
        for arguments, plan in plans.items():
            members = sorted(groups[arguments], key=_by_run_and_step)
            for start in range(0, len(members), self.options.batch_size):
                batch = members[start : start + self.options.batch_size]
                yield self._score_batch(plan, arguments, batch)

    def _score_batch(
        self, plan: Plan, arguments: Arguments, members: Sequence[tuple[Reading, Checkpoint]]
    ) -> list[Row]:
        """Score a batch in one call; if that fails, without those to blame, else one by one."""
        if self.bounds:
            with suppress(Exception):
                return self._bound(plan, arguments, members)
        good, rows = self._check(plan, arguments, members)
        if not self.bounds:
            return rows + [self._row(reading, arguments, status="ok") for reading, _ in good]
        if rows and good:
            return rows + self._score_batch(plan, arguments, good)
        return rows + [self._bound_alone(plan, arguments, member) for member in good]

    def _check(
        self, plan: Plan, arguments: Arguments, members: Sequence[tuple[Reading, Checkpoint]]
    ) -> tuple[list[tuple[Reading, Checkpoint]], list[Row]]:
        """Part a batch into the checkpoints that fit the plan, and rows for those that do not."""
        rows: list[Row] = []
        good: list[tuple[Reading, Checkpoint]] = []
        started = time.perf_counter()
        for reading, checkpoint in members:
            try:
                plan.check(checkpoint.state_dict)
                good.append((reading, checkpoint))
            except Exception as error:  # noqa: PERF203 (one bad one must not end the run)
                rows.append(self._error_row(reading, error, arguments))
        self._count("check", started)
        return good, rows

    def _bound_alone(
        self, plan: Plan, arguments: Arguments, member: tuple[Reading, Checkpoint]
    ) -> Row:
        try:
            return self._bound(plan, arguments, [member])[0]
        except Exception as error:  # not foreseen: the row says what, and the run goes on
            return self._error_row(member[0], error, arguments)

    def _bound(
        self, plan: Plan, arguments: Arguments, members: Sequence[tuple[Reading, Checkpoint]]
    ) -> list[Row]:
        state_dicts = [checkpoint.state_dict for _, checkpoint in members]
        options = self.options
        started = time.perf_counter()
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
            state_dicts, self._x(plan.dtype), norm=options.norm, memory=options.memory
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
        self.reasons[kind] = self.reasons.get(kind, 0) + 1
        uri = reading.file.uri
        self.examples.setdefault(kind, f"{uri}: {reason.removeprefix(f'{uri}: ')}")
        return self._row(reading, arguments, status="error", error=to_utf8(reason))

    def _row(self, reading: Reading, arguments: Arguments | None, **values: Any) -> Row:
        file = reading.file
        known = reading.checkpoint is not None
        metadata = reading.checkpoint.metadata if reading.checkpoint else Metadata({}, file.folder)
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
            found = self._hash(self._plan(arguments).fingerprint)
            self._fingerprints[arguments] = found
        return found

    def _hash(self, plan: str) -> str:
        parts = (VERSION, plan, float(self.options.norm), self.options.seed, self.samples.digest)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _plan(self, arguments: Arguments) -> Plan:
        started = time.perf_counter()
        try:
            return self.architecture.plan(arguments, self.samples.x)
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
    return {
        "index": layer.index,
        "name": layer.name,
        "kind": layer.kind,
        "shape": layer.shape,
        "lower": layer.lower,
        "upper": layer.upper,
        "certified": layer.certified,
        "passes": layer.passes,
    }


def _by_run_and_step(member: tuple[Reading, Checkpoint]) -> tuple[str, int, str]:
    metadata = member[1].metadata
    step = metadata.step
    return metadata.run, -1 if step is None else step, member[0].file.uri
