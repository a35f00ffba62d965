"""All that bounds the trained networks of a sweep: two upper bounds, two lower ones, the truth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

import lipfast
from experiments.analysis.patterns import (
    MOST_UNITS,
    OneHiddenLayer,
    every_pattern_has_an_input,
    input_of,
    largest_pattern,
    smoothed_ascent,
)
from experiments.data import ClassificationData
from experiments.runs import load_model, runs
from experiments.sweep import SweepFolder
from lipfast import Plan
from lipfast.errors import StoreError
from lipfast.ops.threads import one_thread
from lipfast.text import counted

# Samples that a search starts from: those with the largest Jacobian norms, and the first ones.
_STARTS = 16


@dataclass(frozen=True)
class Bracket:
    """Bounds of the Lipschitz constant of one network, all but `truth` certified.

    Attributes:
        width: of the network.
        seed: of its initial weights.
        product: the product of its layers' norms.
        upper: as it was scored.
        found: the lower bound from the data and from inputs that a search found.
        lower: from the data, as it was scored.
        truth: the constant, by enumeration in float64; NaN where that is too much.
    """

    width: int
    seed: int
    product: float
    upper: float
    found: float
    lower: float
    truth: float


def _last_rows(table: pa.Table) -> dict[int, list[dict[str, float]]]:
    """Width to the scores of its last checkpoints, by seed."""
    scored = table.filter(pc.equal(table["status"], "ok"))
    last = scored.filter(pc.equal(scored["step"], pc.max(scored["step"])))
    rows = last.select(["meta.width", "meta.seed", "upper", "lower"]).to_pylist()
    by_width: dict[int, list[dict[str, float]]] = {}
    for row in sorted(rows, key=lambda row: (int(row["meta.width"]), int(row["meta.seed"]))):
        by_width.setdefault(int(row["meta.width"]), []).append(row)
    return by_width


def _truth(network: OneHiddenLayer) -> tuple[float, Tensor]:
    """The Lipschitz constant where it can be enumerated, and inputs (0 or 1, d) that have it."""
    if len(network.bias) > MOST_UNITS or not every_pattern_has_an_input(network):
        return math.nan, network.inner[:0]
    norm, pattern = largest_pattern(network)
    return norm, input_of(network, pattern).unsqueeze(0)


def _truth_and_found(plan: Plan, model: nn.Module, x: Tensor) -> tuple[float, float]:
    """The truth, if it is known, and the certified lower bound from the data and a search."""
    network = OneHiddenLayer.of(model)
    if network is None:
        return math.nan, lipfast.lower_bound(model, x, search="ascent").value
    with one_thread():
        truth, known = _truth(network)
        active = x.double() @ network.inner.mT + network.bias > 0
        largest = network.squares(active.double()).argsort(descending=True)[:_STARTS]
        climbed = smoothed_ascent(network, torch.cat([x[largest], x[:_STARTS]]))
    points = torch.cat([known, climbed]).to(x.dtype)
    return truth, plan.lower(model.state_dict(), torch.cat([x, points])).value


def final_brackets(folder: SweepFolder, table: pa.Table) -> list[Bracket]:
    """Bound the networks of the last checkpoints in all ways, by width and seed.

    Args:
        folder: of the sweep, with its checkpoints and data.
        table: its scores, from `lipfast.read_scores`.

    Raises:
        StoreError: a checkpoint is missing.
    """
    x = ClassificationData.load(folder.data).x_train
    by_run = {(run.width, run.seed): run for run in runs(folder)}
    brackets = []
    for width, rows in _last_rows(table).items():
        seeds = [int(row["meta.seed"]) for row in rows]
        missing = [seed for seed in seeds if (width, seed) not in by_run]
        if missing:
            raise StoreError(
                f"{folder.checkpoints}: the run of width {width}, seed {missing[0]}, "
                "was scored and is gone; run the study again"
            )
        models = [load_model(folder, by_run[width, seed]) for seed in seeds]
        plan = lipfast.compile(models[0], x[:2])
        products = plan.upper([model.state_dict() for model in models])
        for row, seed, model, product in zip(rows, seeds, models, products, strict=True):
            truth, found = _truth_and_found(plan, model, x)
            found = max(found, row["lower"])
            bracket = Bracket(width, seed, product.value, row["upper"], found, row["lower"], truth)
            brackets.append(bracket)
    return brackets


@dataclass(frozen=True)
class Ratios:
    """Quotients of two bounds over networks.

    Attributes:
        mean: geometric mean.
        largest: of them.
        count: how many.
    """

    mean: float
    largest: float
    count: int

    @staticmethod
    def of(upper: Iterable[float], lower: Iterable[float]) -> Ratios:
        """``upper / lower``, one by one; without networks whose lower bound is 0, upper bound inf.

        NaN where none is left.

        Example:
            >>> Ratios.of([2.0, 8.0], [1.0, 1.0])
            Ratios(mean=4.0, largest=8.0, count=2)
        """
        pairs = zip(upper, lower, strict=True)
        ratios = [a / b for a, b in pairs if b > 0 and math.isfinite(a)]
        if not ratios:
            return Ratios(math.nan, math.nan, 0)
        return Ratios(statistics.geometric_mean(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"geometric mean {self.mean:.3f}, largest {self.largest:.3f}"


@dataclass(frozen=True)
class Tightness:
    """How far apart upper and lower bounds of a sweep are.

    Attributes:
        every: stored upper over stored lower bound, at all checkpoints.
        last: the same at the last ones.
        product: the product of norms over the stored lower bound, there.
        found: the stored upper bound over the lower one that a search found, there.
        truth: the stored upper bound over the truth, where that is known; None where it is nowhere.
    """

    every: Ratios
    last: Ratios
    product: Ratios
    found: Ratios
    truth: Ratios | None


def tightness(brackets: Sequence[Bracket], table: pa.Table) -> Tightness:
    """Compare the bounds of a sweep.

    Args:
        brackets: from `final_brackets`; at least one.
        table: the scores of all checkpoints.
    """
    scored = table.filter(pc.equal(table["status"], "ok"))
    known = [b for b in brackets if not math.isnan(b.truth)]
    lower = [b.lower for b in brackets]
    upper = [b.upper for b in brackets]
    return Tightness(
        every=Ratios.of(scored["upper"].to_pylist(), scored["lower"].to_pylist()),
        last=Ratios.of(upper, lower),
        product=Ratios.of((b.product for b in brackets), lower),
        found=Ratios.of(upper, (b.found for b in brackets)),
        truth=Ratios.of((b.upper for b in known), (b.truth for b in known)) if known else None,
    )


def tightness_lines(found: Tightness) -> list[str]:
    """What the command line says of it."""
    lines = [
        f"upper / lower at the {counted(found.last.count, 'last checkpoint')}: {found.last}",
        f"  with the product of norms for upper: {found.product}",
        f"  with a search for lower: {found.found}",
    ]
    if found.truth is not None:
        networks = counted(found.truth.count, "network")
        lines.append(f"  over the truth, enumerated for {networks}: {found.truth}")
    every = counted(found.every.count, "checkpoint")
    return [*lines, f"upper / lower at all {every}: {found.every}"]
