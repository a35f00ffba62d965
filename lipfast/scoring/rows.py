"""Rows of the store: of a checkpoint that was bounded, of one that failed."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from lipfast import errors
from lipfast._native import capability
from lipfast._version import __version__
from lipfast.checkpoints import Metadata
from lipfast.estimators.results import LowerBound, UpperBound, check_order
from lipfast.scoring.budget import BudgetError
from lipfast.scoring.done import MISMATCH, NON_FINITE, NOT_WEIGHTS
from lipfast.scoring.options import Options
from lipfast.scoring.reading import Reading
from lipfast.scoring.schema import LAYER, READING, UNREADABLE, Row
from lipfast.text import to_utf8

_FAILURES: dict[type[Exception], str] = {
    errors.ArgumentError: "architecture or data does not fit",
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
        reading: Reading,
        fingerprint: str,
        upper: UpperBound,
        lower: LowerBound,
        seconds: Mapping[str, float],
    ) -> Row:
        """Make the row of a checkpoint with its bounds; of one that failed if these contradict.

        Args:
            reading: the checkpoint.
            fingerprint: of plan, options and data.
            upper: its upper bound.
            lower: its lower bound.
            seconds: what either took, by column.
        """
        try:
            check_order(lower, upper)
        except errors.LipfastError as error:
            return self.failed(reading, fingerprint, error)
        return self.readable(
            reading,
            fingerprint,
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
            layers=[_layer_values(layer) for layer in upper.layers],
            given=", ".join(sorted({*lower.given, *upper.given})) or None,
            **seconds,
        )

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
            "scored_at": datetime.now(timezone.utc),
            "fingerprint": fingerprint,
            "metadata": metadata.to_json() if checkpoint else None,
            "note": (to_utf8(checkpoint.note) or None) if checkpoint else None,
            **self._constants,
            **values,
        }


def _layer_values(layer: Any) -> Row:
    return {field.name: getattr(layer, field.name) for field in LAYER}
