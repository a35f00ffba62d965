"""Rows of the store: of a checkpoint that was bounded, of one that failed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from lipfast import errors
from lipfast._native import capability
from lipfast._version import __version__
from lipfast.checkpoints import Metadata
from lipfast.estimators.results import LowerBound, check_order
from lipfast.estimators.upper.many import UpperBounds
from lipfast.scoring.budget import BudgetError
from lipfast.scoring.device import DeviceMemoryError
from lipfast.scoring.done import MISMATCH, NON_FINITE, NOT_WEIGHTS
from lipfast.scoring.options import Options
from lipfast.scoring.reading import Reading
from lipfast.scoring.schema import READING, UNREADABLE, Row
from lipfast.text import to_utf8

_FAILURES: dict[type[Exception], str] = {
    errors.ArgumentError: "architecture or data does not fit",
    DeviceMemoryError: "too large for the device's memory",
    BudgetError: "metadata asks for a far larger model",
    errors.CheckpointError: UNREADABLE,
    errors.NotWeightsError: NOT_WEIGHTS,
    errors.UnreachableError: "cannot be reached",
    errors.NonFiniteError: NON_FINITE,
    errors.StateDictError: MISMATCH,
    errors.TraceError: "architecture cannot be traced",
    errors.UnsupportedOpError: "architecture holds an op without a rule",
}


class RowMaker:
    """Makes the rows of one run.

    Args:
        arch: name of the architecture.
        data: name of the samples.
        options: norm and seed.
    """

    def __init__(self, arch: str, data: str, options: Options) -> None:
        self._constants: Row = {
            "norm": float(options.norm),
            "seed": options.seed,
            "arch": arch,
            "data": data,
            "lipfast_version": __version__,
            "reading": READING,
            "torch_version": str(torch.__version__),
            "capability": capability(),
        }

    def bounded(
        self,
        readings: Sequence[Reading],
        fingerprint: str,
        uppers: UpperBounds,
        lowers: Sequence[LowerBound],
        seconds: Mapping[str, float],
    ) -> list[Row]:
        """Make the rows of checkpoints with their bounds; of one that failed if these contradict.

        Args:
            readings: the checkpoints.
            fingerprint: of plan, options and data.
            uppers: their upper bounds.
            lowers: their lower bounds.
            seconds: what either took, by column.
        """
        rows, now = [], datetime.now(timezone.utc)
        numbers = uppers.values, uppers.logs, uppers.certified, uppers.methods
        columns = zip(*numbers, _brackets(uppers), strict=True)
        for index, (reading, lower, column) in enumerate(
            zip(readings, lowers, columns, strict=True)
        ):
            value, log, certified, method, layers = column
            if not lower.value <= value:
                try:
                    check_order(lower, uppers.of(index))
                except errors.LipfastError as error:
                    rows.append(self.failed(reading, fingerprint, error))
                    continue
            row = self.readable(
                reading,
                fingerprint,
                scored_at=now,
                upper=value,
                log_upper=log,
                upper_certified=certified,
                upper_method=method,
                lower=lower.value,
                lower_certified=lower.certified,
                lower_sample=lower.sample,
                jacobian_max=lower.jacobian.value,
                mean=lower.mean,
                rms=lower.rms,
                samples=lower.samples,
                layers=layers,
                given=", ".join(sorted({*lower.given, *uppers.given})) or None,
                **seconds,
            )
            rows.append(row)
        return rows

    def readable(self, reading: Reading, fingerprint: str, **values: Any) -> Row:
        """Make the row of a checkpoint that fits its plan."""
        return self._row(reading, fingerprint, status="ok", **values)

    def failed(self, reading: Reading, fingerprint: str, error: Exception) -> Row:
        """Make the row of a checkpoint that cannot be scored, with the reason."""
        reason = str(error) or "no reason given"
        if not isinstance(error, errors.LipfastError):
            reason = f"{type(error).__name__}: {reason}"
        kind = _FAILURES.get(type(error), type(error).__name__)
        return self._row(reading, fingerprint, status="error", error=to_utf8(reason), kind=kind)

    def _row(self, reading: Reading, fingerprint: str, **values: Any) -> Row:
        file = reading.file
        checkpoint = reading.checkpoint
        metadata = checkpoint.metadata if checkpoint else Metadata(file.extra, file.run)
        return {
            "uri": file.uri,
            "size": file.size,
            "mtime": file.mtime,
            "run": to_utf8(metadata.run),
            "step": metadata.step,
            "epoch": metadata.epoch,
            "seconds_read": reading.seconds,
            "fingerprint": fingerprint,
            "metadata": metadata.to_json() if checkpoint else None,
            "note": (to_utf8(checkpoint.note) or None) if checkpoint else None,
            **self._constants,
            **({} if "scored_at" in values else {"scored_at": datetime.now(timezone.utc)}),
            **values,
        }


def _brackets(uppers: UpperBounds) -> Iterator[list[Row]]:
    """The brackets of the layers of each network, as they are stored."""
    known: dict[int, tuple[list[Row], list[list[Any]]]] = {}  # of the arrays that hold them
    for network in range(len(uppers)):
        brackets, position = uppers.brackets(network)
        if id(brackets) not in known:
            layers: list[Row] = [
                {"index": layer.index, "name": layer.name, "kind": layer.kind, "shape": layer.shape}
                for layer in brackets.layers
            ]
            columns = (brackets.lower, brackets.upper, brackets.certified, brackets.passes)
            known[id(brackets)] = layers, [column.tolist() for column in columns]
        layers, values = known[id(brackets)]
        rows = zip(layers, *(column[position] for column in values), strict=True)
        yield [
            {**layer, "lower": lower, "upper": upper, "certified": certified, "passes": passes}
            for layer, lower, upper, certified, passes in rows
        ]
