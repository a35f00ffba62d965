"""What a collecting step reads: scores, metrics and checkpoints of the sweeps of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

import lipfast
from experiments.data import ClassificationData
from experiments.runs import Run, load_model, runs
from experiments.sweep import SweepFolder, found_folder, read_metrics
from lipfast.errors import StoreError

# Name in the results to column of the scores. "lower" is the study's C_lower, the largest Jacobian
# norm over the training samples; "certified" is the lower bound that is proved.
_SCORES = {
    "train_loss": "meta.train_loss",
    "test_loss": "meta.test_loss",
    "train_error": "meta.train_error",
    "test_error": "meta.test_error",
    "lower": "jacobian_max",
    "certified": "lower",
    "mean": "mean",
    "rms": "rms",
    "upper": "upper",
    "log_upper": "log_upper",
}
_METRICS = ("path_length", "distance", "weight_norm", "gradient_norm")


def _number_or_none(value: object) -> float | None:
    if value is None:
        return None
    number = float(value)  # type: ignore[arg-type]
    return None if math.isnan(number) else number


@dataclass(frozen=True)
class Sweep:
    """One trained and scored sweep.

    Attributes:
        study: that trained it.
        variant: of the study, "" where there is one only.
        folder: of the sweep.
    """

    study: str
    variant: str
    folder: SweepFolder

    @property
    def label(self) -> str:
        """`<study>/<variant>`, or the study alone."""
        return f"{self.study}/{self.variant}" if self.variant else self.study

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings, from `sweep.json`."""
        content: dict[str, Any] = json.loads(self.folder.settings.read_text(encoding="utf-8"))
        return content

    @cached_property
    def data(self) -> ClassificationData:
        """Training and test set."""
        return ClassificationData.load(self.folder.data)

    @property
    def runs(self) -> list[Run]:
        """The runs that did not diverge, by width and seed."""
        complete = [run for run in runs(self.folder) if run.status == "ok"]
        return sorted(complete, key=lambda run: (run.width, run.seed))

    def model(self, run: Run, step: int = -1) -> nn.Module:
        """The network of a run at a step, by default the last, in eval mode."""
        return load_model(self.folder, run, step)

    def scores(self) -> Iterator[dict[str, Any]]:
        """One row per scored checkpoint: where it belongs, losses, bounds, metrics."""
        table = lipfast.read_scores(self.folder.scores)
        table = table.filter(pc.equal(table["status"], "ok"))
        metrics = self._metrics()
        for record in table.to_pylist():
            row: dict[str, Any] = {
                "study": self.study,
                "variant": self.variant,
                "width": int(record["meta.width"]),
                "seed": int(record["meta.seed"]),
                "step": int(record["step"]),
                "epoch": _number_or_none(record.get("epoch")),
            }
            row.update({name: _number_or_none(record.get(c)) for name, c in _SCORES.items()})
            logged = metrics.get((row["width"], row["seed"], row["step"]), {})
            row.update({name: _number_or_none(logged.get(name)) for name in _METRICS})
            yield row

    def last_scores(self) -> Iterator[dict[str, Any]]:
        """The rows of the last checkpoint of each run that did not diverge."""
        last = {(run.width, run.seed): run.last_step for run in self.runs}
        for row in self.scores():
            if last.get((row["width"], row["seed"])) == row["step"]:
                yield row

    def _metrics(self) -> dict[tuple[int, int, int], Mapping[str, Any]]:
        try:
            table: pa.Table = read_metrics(self.folder)
        except (FileNotFoundError, StoreError):
            return {}
        return {
            (int(row["width"]), int(row["seed"]), int(row["step"])): row
            for row in table.to_pylist()
        }


def spread(steps: list[int], count: int) -> list[int]:
    """Choose about `count` of the ascending steps, evenly, the first and the last among them.

    Example:
        >>> spread([0, 1, 3, 10, 30, 100], 3)
        [0, 3, 100]
    """
    if len(steps) <= count:
        return steps
    places = {round(i * (len(steps) - 1) / (count - 1)) for i in range(count)}
    return [steps[place] for place in sorted(places)]


@dataclass(frozen=True)
class Sources:
    """The sweeps of a study and of those that it uses, at one scale.

    Attributes:
        name: of the study.
        scale: of all sweeps.
        out: the folder of all sweeps.
    """

    name: str
    scale: str
    out: Path

    def sweeps(self, study: str | None = None) -> dict[str, Sweep]:
        """The scored sweeps of a study (by default its own) by variant, in the order of names.

        Raises:
            StoreError: there is none; the message says the command that makes them.
        """
        study = study or self.name
        root = self.out / f"{study}-{self.scale}"
        if (root / "sweep.json").is_file():
            found = {"": root}
        else:
            found = {path.parent.name: path.parent for path in sorted(root.glob("*/sweep.json"))}
        folders = {variant: found_folder(path) for variant, path in found.items()}
        swept = {
            variant: Sweep(study, variant, folder)
            for variant, folder in folders.items()
            if folder.scores.is_dir()
        }
        if not swept:
            raise StoreError(
                f"{root} holds no scored sweep; run: python -m experiments run {study} "
                f"--scale {self.scale} --out {self.out}"
            )
        return swept

    def sweep(self, study: str | None = None, variant: str | None = None) -> Sweep:
        """One sweep: that of a variant, or the study's first.

        Raises:
            StoreError: it has not been run.
        """
        found = self.sweeps(study)
        if variant is None:
            return next(iter(found.values()))
        if variant not in found:
            raise StoreError(
                f"{study or self.name} has no scored sweep '{variant}', only {', '.join(found)}"
            )
        return found[variant]

    def available(self, wanted: Iterable[tuple[str, str | None]]) -> list[Sweep]:
        """The sweeps, of these studies and variants, that have been run and scored.

        Raises:
            StoreError: none has.
        """
        listed = list(wanted)
        found = [sweep for place in listed if (sweep := self._find(*place)) is not None]
        return found or [self.sweep(*listed[0])]

    def _find(self, study: str, variant: str | None) -> Sweep | None:
        try:
            return self.sweep(study, variant)
        except StoreError:
            return None
