"""What several studies share: rows to collect, numbers as text, panels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.drawing import (
    BOUNDS,
    SERIES,
    STYLE,
    Curve,
    plot_curve,
    time_axis,
    value_axis,
)
from experiments.findings.sources import Sources, Sweep
from experiments.results import Results, Rows

LIPSCHITZ = "Lipschitz constant (2-norm)"


def number(value: float) -> str:
    """A number with three significant digits, readable.

    Example:
        >>> number(0.123456), number(1234.5), number(2.5e27)
        ('0.123', '1230', '2.50e+27')
    """
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def numbers(values: Iterable[float]) -> str:
    """Numbers with three significant digits each, separated by commas."""
    return ", ".join(number(value) for value in values)


def chosen_sweeps(sources: Sources, pairs: Sequence[tuple[str, str]]) -> list[Sweep]:
    """The sweeps of these studies and variants."""
    return [sources.sweep(study, variant) for study, variant in pairs]


def last_rows(sources: Sources) -> Iterator[dict[str, Any]]:
    """Scores of the last checkpoints of a study's own sweeps."""
    for sweep in sources.sweeps().values():
        yield from sweep.last_scores()


def all_rows(sources: Sources) -> Iterator[dict[str, Any]]:
    """Scores of all checkpoints of a study's own sweeps."""
    for sweep in sources.sweeps().values():
        yield from sweep.scores()


def variants(results: Results) -> list[str]:
    """The variants of a study in the order in which their sweeps were collected."""
    return list(dict.fromkeys(results.rows["variant"].tolist()))


def final_means(rows: Rows, quantities: Sequence[str]) -> dict[str, float]:
    """Mean over runs of each quantity at the last step of each run."""
    last = rows.last()
    return {name: float(np.nanmean(last[name])) for name in quantities}


def setting(results: Results, key: str, variant: str | None = None) -> Any:
    """A setting of the only sweep, or of the sweep of a variant."""
    for label, settings in results.settings.items():
        if variant is None or label.endswith(f"/{variant}"):
            return settings.get(key)
    raise KeyError(f"{key} of {variant}")


@contextmanager
def styled() -> Iterator[None]:
    """The style of all figures."""
    with rc_context(STYLE):
        yield


def panels(count: int, *, width: float = 9.0, height: float = 3.6) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)).ravel())


def draw_bounds_over_time(
    axes: Axes, rows: Rows, curves: Mapping[str, Curve] = BOUNDS, *, by: str = "epoch"
) -> None:
    """Bounds against time, mean and standard deviation over seeds."""
    for name, curve in curves.items():
        line = rows.average(by, name)
        plot_curve(axes, line.x, line.mean, line.std, curve)
    time_axis(axes, np.array(rows.values(by)), "epoch" if by == "epoch" else "training step")
    value_axis(axes)


def draw_variants_over_time(
    axes: Axes,
    results: Results,
    name: str,
    label: Callable[[str], str] = str,
    *,
    by: str = "epoch",
) -> None:
    """One quantity against time, a line per variant."""
    for (colour, marker), variant in zip(SERIES, variants(results), strict=False):
        line = results.rows.where(variant=variant).average(by, name)
        shown = np.where(line.mean > 0, line.mean, np.nan)  # zero has no place on the axis
        plot_curve(axes, line.x, shown, line.std, Curve(label(variant), colour, marker))
    time_axis(axes, np.array(results.rows.values(by)), by)
    value_axis(axes)


def draw_final_bounds(
    axes: Axes, results: Results, names: Sequence[str], labels: Sequence[str]
) -> None:
    """Bounds at the end of training, one place on the axis per variant."""
    places = np.arange(len(names))
    for key, curve in BOUNDS.items():
        columns = [results.rows.where(variant=name).last()[key] for name in names]
        mean = np.array([np.nanmean(column) for column in columns])
        std = np.array([np.nanstd(column, ddof=1) if len(column) > 1 else 0 for column in columns])
        plot_curve(axes, places, mean, std, curve)
    axes.set_xticks(places, labels)
    value_axis(axes)
    axes.set_ylabel(LIPSCHITZ)
