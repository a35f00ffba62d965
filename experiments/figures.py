"""Figures of a sweep, as PNG and PDF; every curve has its own colour, marker and line style."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from experiments.analysis import (
    WidthSummary,
    interpolation_threshold,
    peak_widths,
    scored_rows,
    summarise,
)
from experiments.config import SweepConfig

_STYLE: Any = {
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
class _Curve:
    """How a quantity is drawn. The colours are those of Okabe and Ito (2008)."""

    label: str
    colour: str
    marker: str
    line: str = "-"


_TEST_LOSS = {"test_loss": _Curve("test loss", "#D55E00", "o")}
_TRAIN_LOSS = {"train_loss": _Curve("training loss", "#CC79A7", "s", "--")}
_BOUNDS = {
    "upper": _Curve("upper bound", "#000000", "v"),
    "lower": _Curve("lower bound", "#0072B2", "^"),
    "mean": _Curve("mean Jacobian norm", "#009E73", "D", "--"),
}
_WIDTH_COLOURS = ("#E69F00", "#D55E00", "#009E73", "#0072B2")
_WIDTH_MARKERS = ("o", "s", "^", "D")


def _band(
    mean: NDArray[np.float64], std: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    # The lower edge stays positive: the axis is logarithmic.
    return np.maximum(mean - std, mean / 10), mean + std


def _draw_curves(axes: Axes, summary: WidthSummary, curves: dict[str, _Curve]) -> None:
    for name, curve in curves.items():
        mean, std = summary.mean[name], summary.std[name]
        axes.plot(
            summary.widths,
            mean,
            color=curve.colour,
            marker=curve.marker,
            linestyle=curve.line,
            label=curve.label,
            markeredgecolor="white",
            markeredgewidth=0.6,
        )
        axes.fill_between(
            summary.widths, *_band(mean, std), color=curve.colour, alpha=0.18, linewidth=0
        )


def _ring_peak(axes: Axes, summary: WidthSummary, names: Sequence[str]) -> None:
    peaks = peak_widths(summary, names)
    for name, width in peaks.items():
        value = summary.mean[name][summary.widths == width]
        axes.plot(
            [width], value, "o", markersize=12, markerfacecolor="none", markeredgecolor="0.35"
        )


def _width_axis(axes: Axes, widths: NDArray[np.int64]) -> None:
    axes.set_xscale("log", base=2)
    # Widths one octave apart are labelled, so that labels never touch.
    labelled: list[int] = []
    for width in widths:
        if not labelled or width >= 1.9 * labelled[-1]:
            labelled.append(int(width))
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(FixedLocator(widths.tolist()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axes.set_xlabel("width (hidden units)")


def _value_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _mark_threshold(axes: Axes, threshold: int | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color="0.35", linestyle=(0, (2, 2)), linewidth=1.3, zorder=0.9)


def _caption(summary: WidthSummary, config: SweepConfig, threshold: int | None) -> str:
    seeds = int(summary.seeds.max())
    noise = f", {config.label_noise:.0%} of labels redrawn" if config.label_noise else ""
    text = f"MNIST1D, {config.train_size} training samples{noise}. "
    text += f"Mean and standard deviation of {seeds} seeds; " if seeds > 1 else "One seed; "
    text += "rings: peaks"
    if threshold is not None:
        text += f"; dashed line: interpolation threshold (width {threshold})"
    return (
        f"{text}.\nUpper bound: product of the layers' spectral norms. "
        "Lower bound: largest spectral norm of the Jacobian over the training samples."
    )


def double_descent_figure(summary: WidthSummary, config: SweepConfig) -> Figure:
    """Draw losses (left) and Lipschitz bounds (right) against width, all axes logarithmic.

    Curves are means over seeds, bands one sample standard deviation; the peaks of the test loss and
    of the bounds are ringed and the interpolation threshold is a dashed line.

    Args:
        summary: of the sweep.
        config: of the sweep; it defines the threshold.
    """
    threshold = interpolation_threshold(summary, config)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        panels = figure.subplot_mosaic(
            [["test", "bounds"], ["train", "bounds"]], width_ratios=[1, 1.25]
        )
        for name, curves, peaks in (
            ("test", _TEST_LOSS, ("test_loss",)),
            ("train", _TRAIN_LOSS, ()),
            ("bounds", _BOUNDS, ("upper", "lower")),
        ):
            axes = panels[name]
            _draw_curves(axes, summary, curves)
            _width_axis(axes, summary.widths)
            _value_axis(axes)
            _mark_threshold(axes, threshold)
            _ring_peak(axes, summary, peaks)
        panels["test"].set_xlabel("")
        panels["test"].set_ylabel("test loss")
        panels["train"].set_ylabel("training loss")
        panels["bounds"].set_ylabel("Lipschitz constant (2-norm)")
        panels["bounds"].legend(loc="best")
        figure.align_ylabels([panels["test"], panels["train"]])
        caption = _caption(summary, config, threshold)
        figure.supxlabel(caption, fontsize=8.5, color="0.3", linespacing=1.4)
    return figure


def _chosen_widths(summary: WidthSummary) -> list[int]:
    """Narrowest, peak of the upper bound, widest and one halfway between the last two."""
    widths = summary.widths.tolist()
    peak = widths.index(peak_widths(summary, ["upper"])["upper"])
    return [widths[i] for i in sorted({0, peak, (peak + len(widths) - 1) // 2, len(widths) - 1})]


def training_figure(table: pa.Table) -> Figure:
    """Draw the bounds of a few widths against the training step, means over seeds.

    Args:
        table: from `lipfast.read_scores`.
    """
    rows = scored_rows(table)
    chosen = _chosen_widths(summarise(table))
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        titles = {"upper": "Upper bound", "lower": "Lower bound (largest Jacobian norm)"}
        for axes, (name, title) in zip(panels, titles.items(), strict=True):
            for index, width in enumerate(chosen):
                of_width = rows["width"] == width
                steps = np.unique(rows["step"][of_width])
                values = [rows[name][of_width & (rows["step"] == step)].mean() for step in steps]
                axes.plot(
                    steps,
                    values,
                    color=_WIDTH_COLOURS[index],
                    marker=_WIDTH_MARKERS[index],
                    label=f"width {width}",
                    clip_on=False,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                )
            axes.set_xscale("symlog", linthresh=1)
            axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            _value_axis(axes)
            axes.set_xlabel("training step")
            axes.set_title(title)
        panels[0].set_ylabel("Lipschitz constant (2-norm)")
        panels[0].legend(loc="best")
    return figure


def save_figure(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Write `<stem>.png` and `<stem>.pdf`; the same figure gives the same bytes.

    Returns:
        The two paths.
    """
    png, pdf = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    figure.savefig(png, dpi=160)
    figure.savefig(pdf, metadata={"CreationDate": None})
    return png, pdf


def draw_sweep(table: pa.Table, config: SweepConfig, folder: Path) -> list[Path]:
    """Draw all figures of a sweep into a folder.

    Args:
        table: from `lipfast.read_scores`.
        config: of the sweep.
        folder: that exists; gets `<name>.png`, `<name>.pdf` and the same with `-training`.

    Returns:
        The paths written.
    """
    figures = {
        config.name: double_descent_figure(summarise(table), config),
        f"{config.name}-training": training_figure(table),
    }
    return [path for name, figure in figures.items() for path in save_figure(figure, folder / name)]
