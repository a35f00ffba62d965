"""Figures of all that bounds the trained networks of a sweep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.analysis.patterns import MOST_UNITS
from experiments.brackets import Bracket
from experiments.drawing import STYLE, Curve, plot_curve, ring, value_axis, width_axis

# The lower bound from the data is light and dashed beside the one that a search found.
_CURVES = {
    "product": Curve("upper: product of norms", "#8C8C8C", "s", "--"),
    "upper": Curve("upper: quadratic constraints", "#000000", "v"),
    "truth": Curve("Lipschitz constant, enumerated", "#D55E00", "*", ""),
    "found": Curve("lower: found by a search", "#0072B2", "^"),
    "lower": Curve("lower: training samples", "#56B4E9", "D", ":"),
}
BRACKET_CAPTION = (
    "Bounds are certified, their means are drawn: the constants' mean lies in the shaded band. "
    f"Enumerated: all patterns of {MOST_UNITS} units or fewer."
)


def _means(
    brackets: Sequence[Bracket], over: str | None = None
) -> tuple[list[int], Mapping[str, NDArray[np.float64]]]:
    """Widths, and means over seeds of every bound, or of its quotient by one of them."""
    widths = sorted({bracket.width for bracket in brackets})
    columns: dict[str, list[float]] = {name: [] for name in _CURVES}
    for width in widths:
        rows = [dataclasses.asdict(b) for b in brackets if b.width == width]
        for name, column in columns.items():
            values = [row[name] / (row[over] if over else 1) for row in rows]
            column.append(float(np.mean(values)))
    return widths, {name: np.array(column) for name, column in columns.items()}


def _draw(
    axes: Axes, widths: Sequence[int], means: Mapping[str, NDArray[np.float64]], names: list[str]
) -> None:
    axes.fill_between(
        widths, means["found"], means["upper"], color="#F0E442", alpha=0.45, linewidth=0, zorder=0.5
    )
    for name in names:
        if np.isfinite(means[name]).any():
            plot_curve(axes, widths, means[name], None, _CURVES[name])
            if name == "truth":
                axes.lines[-1].set(markersize=10, zorder=4)


def draw_brackets(axes: Axes, brackets: Sequence[Bracket]) -> None:
    """Draw every bound against width, means over seeds; the peaks of the band are ringed."""
    widths, means = _means(brackets)
    _draw(axes, widths, means, list(_CURVES))
    for top in {int(np.argmax(means[name])) for name in ("upper", "found")}:
        ring(axes, widths[top], float(np.sqrt(means["upper"][top] * means["found"][top])))


def bracket_figure(brackets: Sequence[Bracket]) -> Figure:
    """Draw all bounds (left) and how far above the largest lower bound the upper ones lie (right).

    Args:
        brackets: from `final_brackets`; at least one.
    """
    widths, ratios = _means(brackets, over="found")
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_brackets(left, brackets)
        left.set_ylabel("Lipschitz constant (2-norm)")
        _draw(right, widths, ratios, ["product", "upper", "truth", "found"])
        right.set_ylabel("bound over the lower bound found by a search")
        for axes in (left, right):
            width_axis(axes, widths)
            value_axis(axes)
        left.legend(loc="upper right", fontsize=9)
        figure.supxlabel(BRACKET_CAPTION, fontsize=8.5, color="0.3")
    return figure
