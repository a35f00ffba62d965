"""F3 and F4: depth, and the number of training samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.analysis.power_law import PowerLaw, fit_power_law
from experiments.drawing import BOUNDS, plot_curve, value_axis
from experiments.findings.common import LIPSCHITZ, number, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results, Rows

_BOUND_NAMES = ("upper", "lower", "mean")


def _collect_depths(sources: Sources) -> Iterator[dict[str, Any]]:
    for sweep in sources.sweeps().values():
        depth = float(sweep.settings["depth"])
        for row in sweep.scores():
            if row["step"] == 0:
                yield {**row, "depth": depth, "kind": "start"}
        for row in sweep.last_scores():
            yield {**row, "depth": depth, "kind": "trained"}


def _slopes(rows: Rows, by: str, start: float = 0.0) -> dict[str, PowerLaw]:
    lines = {name: rows.average(by, name) for name in _BOUND_NAMES}
    return {
        name: fit_power_law(line.x, line.mean, window=(start, np.inf))
        for name, line in lines.items()
    }


def _fits_text(fits: dict[str, PowerLaw]) -> str:
    return ", ".join(f"{fit.slope:.2f}" for fit in fits.values())


def _evaluate_depths(results: Results) -> Outcome:
    trained = _slopes(results.rows.where(kind="trained"), "depth", 2)
    start = _slopes(results.rows.where(kind="start"), "depth", 2)
    order = [trained[name].slope for name in _BOUND_NAMES]
    checks = (
        Check(
            "after training all bounds grow with the depth from 2 hidden layers on (slopes of "
            "upper, lower, mean above 0)",
            "3.33, 2.03, 1.19",
            _fits_text(trained),
            min(order) > 0,
        ),
        Check(
            "the upper bound grows faster than the lower one, and that faster than the mean",
            "3.33 > 2.03 > 1.19",
            _fits_text(trained),
            order[0] > order[1] > order[2],
        ),
        Check(
            "at initialisation the lower bound falls with the depth",
            "-2.52",
            f"{start['lower'].slope:.2f}",
            start["lower"].slope < 0,
        ),
    )
    return Outcome(checks, f"slope in depth: upper {order[0]:.2f}, lower {order[1]:.2f}")


def _draw_bounds(axes: Axes, rows: Rows, by: str, label: str) -> None:
    for name, curve in BOUNDS.items():
        line = rows.average(by, name)
        plot_curve(axes, line.x, line.mean, line.std, curve)
    axes.set_xscale("log")
    ticks = rows.values(by)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)
    value_axis(axes)


def _draw_depths(results: Results) -> Figure:
    with styled():
        figure, axes = panels(2)
        titles = {"start": "at initialisation", "trained": "after training"}
        for place, (kind, title) in zip(axes, titles.items(), strict=True):
            _draw_bounds(place, results.rows.where(kind=kind), "depth", "hidden layers")
            place.set_title(title)
        axes[0].set_ylabel(LIPSCHITZ)
        axes[1].legend()
    return figure


F3 = Finding(
    "F3",
    "F3-depth",
    "Depth",
    "How do the bounds grow with the number of layers?",
    "appendix 3.19, figures 45 to 50",
    _collect_depths,
    _evaluate_depths,
    _draw_depths,
)


def _collect_samples(sources: Sources) -> Iterator[dict[str, Any]]:
    for sweep in sources.sweeps().values():
        for row in sweep.last_scores():
            yield {**row, "samples": float(sweep.settings["train_size"])}


def _evaluate_samples(results: Results) -> Outcome:
    fits = _slopes(results.rows, "samples")
    worst = min(fit.r_squared for fit in fits.values())
    checks = (
        Check(
            "all bounds grow with the number of samples, more slowly than linearly (slopes of "
            "upper, lower, mean between 0 and 1)",
            "0.53, 0.37, 0.36",
            _fits_text(fits),
            all(0 < fit.slope < 1 for fit in fits.values()),
        ),
        Check(
            "as a power law: R^2 at least 0.9 for each",
            "0.968, 0.993, 0.993",
            f"smallest {worst:.3f}",
            worst >= 0.9,
        ),
    )
    return Outcome(checks, f"slope of the lower bound in samples: {number(fits['lower'].slope)}")


def _draw_samples(results: Results) -> Figure:
    with styled():
        figure, (axes,) = panels(1, width=5.6)
        _draw_bounds(axes, results.rows, "samples", "training samples")
        axes.set_ylabel(LIPSCHITZ)
        axes.legend()
    return figure


F4 = Finding(
    "F4",
    "F4-samples",
    "The number of training samples",
    "Do the bounds grow with the number of samples to be fitted?",
    "appendix 3.20, figure 52",
    _collect_samples,
    _evaluate_samples,
    _draw_samples,
)
