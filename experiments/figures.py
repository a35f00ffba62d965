"""Figures of a sweep, as PNG and PDF; every curve has its own colour, marker and line style."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from experiments.analysis import (
    WidthSummary,
    interpolation_threshold,
    peak_widths,
    scored_rows,
    summarise,
)
from experiments.bracket_figures import BRACKET_CAPTION, bracket_figure, draw_brackets
from experiments.brackets import Bracket
from experiments.config import SweepConfig
from experiments.drawing import (
    BOUNDS,
    STYLE,
    TEST_LOSS,
    TRAIN_LOSS,
    Curve,
    mark_vertical,
    plot_curve,
    ring,
    value_axis,
    width_axis,
)

_TEST_LOSS = {"test_loss": TEST_LOSS}
_TRAIN_LOSS = {"train_loss": TRAIN_LOSS}
_WIDTH_COLOURS = ("#E69F00", "#D55E00", "#009E73", "#0072B2")
_WIDTH_MARKERS = ("o", "s", "^", "D")


def _draw_curves(axes: Axes, summary: WidthSummary, curves: dict[str, Curve]) -> None:
    for name, curve in curves.items():
        plot_curve(axes, summary.widths, summary.mean[name], summary.std[name], curve)


def _ring_peak(axes: Axes, summary: WidthSummary, names: Sequence[str]) -> None:
    peaks = peak_widths(summary, names)
    for name, width in peaks.items():
        value = summary.mean[name][summary.widths == width]
        ring(axes, width, float(value[0]))


_BOUNDS_CAPTION = (
    "Upper bound: product of the layers' spectral norms. "
    "Lower bound: largest spectral norm of the Jacobian over the training samples."
)


def _caption(summary: WidthSummary, config: SweepConfig, threshold: int | None) -> str:
    seeds = int(summary.seeds.max())
    noise = f", {config.label_noise:.0%} of labels redrawn" if config.label_noise else ""
    text = f"MNIST1D, {config.train_size} training samples{noise}. "
    text += f"Mean and standard deviation of {seeds} seeds; " if seeds > 1 else "One seed; "
    text += "rings: peaks"
    if threshold is not None:
        text += f"; dashed line: interpolation threshold (width {threshold})"
    return f"{text}."


def _draw_bounds(axes: Axes, summary: WidthSummary, brackets: Sequence[Bracket]) -> str:
    """Draw the bounds; return what the caption says of them."""
    if brackets:
        draw_brackets(axes, brackets)
        return BRACKET_CAPTION
    _draw_curves(axes, summary, BOUNDS)
    _ring_peak(axes, summary, ("upper", "lower"))
    return _BOUNDS_CAPTION


def double_descent_figure(
    summary: WidthSummary, config: SweepConfig, brackets: Sequence[Bracket] = ()
) -> Figure:
    """Draw losses (left) and Lipschitz bounds (right) against width, all axes logarithmic.

    Curves are means over seeds, bands one sample standard deviation; the peaks of the test loss and
    of the bounds are ringed and the interpolation threshold is a dashed line.

    Args:
        summary: of the sweep.
        config: of the sweep; it defines the threshold.
        brackets: from `final_brackets`: all of them are drawn in the place of the stored bounds.
    """
    threshold = interpolation_threshold(summary, config)
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 4.8), layout="constrained")
        panels = figure.subplot_mosaic(
            [["test", "bounds"], ["train", "bounds"]], width_ratios=[1, 1.25]
        )
        _draw_curves(panels["test"], summary, _TEST_LOSS)
        _ring_peak(panels["test"], summary, ("test_loss",))
        _draw_curves(panels["train"], summary, _TRAIN_LOSS)
        of_bounds = _draw_bounds(panels["bounds"], summary, brackets)
        for axes in panels.values():
            width_axis(axes, summary.widths.tolist())
            value_axis(axes)
            mark_vertical(axes, threshold)
        panels["test"].set_xlabel("")
        panels["test"].set_ylabel("test loss")
        panels["train"].set_ylabel("training loss")
        panels["bounds"].set_ylabel("Lipschitz constant (2-norm)")
        panels["bounds"].legend(loc="best")
        figure.align_ylabels([panels["test"], panels["train"]])
        caption = f"{_caption(summary, config, threshold)}\n{of_bounds}"
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
    with rc_context(STYLE):
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
            value_axis(axes)
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


def draw_sweep(
    table: pa.Table, config: SweepConfig, folder: Path, brackets: Sequence[Bracket] = ()
) -> list[Path]:
    """Draw all figures of a sweep into a folder.

    Args:
        table: from `lipfast.read_scores`.
        config: of the sweep.
        folder: that exists; gets `<name>.png`, `<name>.pdf` and the same with `-training`, and,
            where there are brackets, with `-brackets`.
        brackets: from `final_brackets`.

    Returns:
        The paths written.
    """
    figures = {
        config.name: double_descent_figure(summarise(table), config, brackets),
        f"{config.name}-training": training_figure(table),
        **({f"{config.name}-brackets": bracket_figure(brackets)} if brackets else {}),
    }
    return [path for name, figure in figures.items() for path in save_figure(figure, folder / name)]
