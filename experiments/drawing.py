"""How figures look: colours, markers, axes; shared by all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
}


@dataclass(frozen=True)
class Curve:
    """How a quantity is drawn. The colours are those of Okabe and Ito (2008)."""

    label: str
    colour: str
    marker: str
    line: str = "-"


TEST_LOSS = Curve("test loss", "#D55E00", "o")
TRAIN_LOSS = Curve("training loss", "#CC79A7", "s", "--")
UPPER = Curve("upper bound", "#000000", "v")
LOWER = Curve("lower bound", "#0072B2", "^")
MEAN = Curve("mean Jacobian norm", "#009E73", "D", "--")
BOUNDS = {"upper": UPPER, "lower": LOWER, "mean": MEAN}
# For series that are no quantity of the above: variants, widths, seeds.
SERIES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)


def plot_curve(
    axes: Axes,
    x: ArrayLike,
    mean: NDArray[np.float64],
    std: NDArray[np.float64] | None,
    curve: Curve,
) -> None:
    """Draw a curve and, around it, a band of one standard deviation."""
    axes.plot(
        x,
        mean,
        color=curve.colour,
        marker=curve.marker,
        linestyle=curve.line,
        label=curve.label,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )
    if std is not None and np.any(std > 0):
        # The lower edge stays positive: the axis is logarithmic.
        low = np.maximum(mean - std, mean / 10)
        axes.fill_between(x, low, mean + std, color=curve.colour, alpha=0.18, linewidth=0)


def width_axis(axes: Axes, widths: Sequence[float], label: str = "width (hidden units)") -> None:
    """A logarithmic axis with ticks at the widths, labelled one or two octaves apart."""
    axes.set_xscale("log", base=2)
    apart = 1.9 if max(widths) <= 300 * min(widths) else 3.8
    labelled: list[float] = []
    for width in widths:
        if not labelled or width >= apart * labelled[-1]:
            labelled.append(width)
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(FixedLocator(list(widths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel(label)


def _subdivision(ratio: float) -> tuple[float, ...]:
    if ratio < 8:
        return (1, 1.5, 2, 3, 4, 5, 7)
    return (1, 2, 5) if ratio < 200 else (1,)


def value_axis(axes: Axes) -> None:
    """A logarithmic axis of values, with ticks at 1, 2, 5 where the range is small."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=_subdivision(high / low)))
    axes.yaxis.set_minor_locator(NullLocator())
    if low > 1e-3 and high < 1e5:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def time_axis(axes: Axes, x: NDArray[np.float64], label: str = "epoch") -> None:
    """A logarithmic axis of time that shows 0 too."""
    positive = x[x > 0]
    start = float(positive.min()) if len(positive) else 1.0
    axes.set_xscale("symlog", linthresh=start, linscale=0.5)
    axes.set_xlim(left=0)
    axes.xaxis.set_minor_locator(NullLocator())
    # Ticks between 0 and the first point would touch the label of 0.
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "" if 0 < value < 0.99 * start else f"{value:g}")
    )
    axes.set_xlabel(label)


def ring(axes: Axes, x: float, y: float) -> None:
    """Mark a peak."""
    axes.plot([x], [y], "o", markersize=12, markerfacecolor="none", markeredgecolor="0.35")


def mark_vertical(axes: Axes, x: float | None) -> None:
    """A dashed vertical line, for a threshold."""
    if x is not None:
        axes.axvline(x, color="0.35", linestyle=(0, (2, 2)), linewidth=1.3, zorder=0.9)
