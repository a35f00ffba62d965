"""F7: the distribution of per-sample Jacobian norms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor

import lipfast
from experiments.analysis.histogram import norm_histogram
from experiments.drawing import SERIES, value_axis, width_axis
from experiments.findings.common import number, panels, styled
from experiments.findings.double_descent import C1
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results

_BINS = 40


def _collect_histograms(sources: Sources) -> Iterator[dict[str, Any]]:
    sweep = sources.sweep(C1.name)
    norms: dict[int, list[Tensor]] = {}
    for run in sweep.runs:
        of_run = lipfast.jacobian_norms(sweep.model(run), sweep.data.x_train)
        norms.setdefault(run.width, []).append(of_run)
    pooled = {width: torch.cat(runs).numpy() for width, runs in norms.items()}
    everything = np.concatenate(list(pooled.values()))
    limits = float(everything[everything > 0].min()), float(everything.max())
    for width, values in pooled.items():
        histogram = norm_histogram(values, bins=_BINS, limits=limits)
        for place, count in enumerate(histogram.counts.tolist()):
            yield {
                "width": width,
                "low": float(histogram.edges[place]),
                "high": float(histogram.edges[place + 1]),
                "share": count / len(values),
                "median": histogram.median,
                "largest": histogram.largest,
                "tail": histogram.tail,
            }


def _evaluate_histograms(results: Results) -> Outcome:
    rows = results.rows
    largest, median, tail = (rows.average("width", name) for name in ("largest", "median", "tail"))
    top = int(np.argmax(largest.mean))
    checks = (
        Check(
            "at the widest network not only the largest norm but the median too is smaller than "
            "where the largest norm peaks",
            "the distribution of FCN 256 lies left of FCN 64",
            f"width {largest.x[top]:g}: median {number(median.mean[top])}, largest "
            f"{number(largest.mean[top])}; width {largest.x[-1]:g}: {number(median.mean[-1])}, "
            f"{number(largest.mean[-1])}",
            bool(median.mean[-1] < median.mean[top] and largest.mean[-1] < largest.mean[top]),
        ),
        Check(
            "for fully connected networks the tail is short: the largest norm is less than ten "
            "times the median at every width",
            "long tails are seen for ResNets only (figure 31)",
            f"largest over median: {number(tail.mean.min())} to {number(tail.mean.max())}",
            bool((tail.mean < 10).all()),
        ),
    )
    return Outcome(checks, f"largest over median norm: at most {number(tail.mean.max())}")


def _draw_histograms(results: Results) -> Figure:
    rows = results.rows
    widths = rows.values("width")
    largest = rows.average("width", "largest").mean
    top = int(np.argmax(largest))
    last = len(widths) - 1
    chosen = sorted({0, top, (top + last) // 2, last})
    with styled():
        figure, (distribution, summary) = panels(2)
        for (colour, _), place in zip(SERIES, chosen, strict=False):
            part = rows.where(width=widths[place])
            edges = np.append(part["low"], part["high"][-1])
            distribution.stairs(
                part["share"], edges, color=colour, label=f"width {widths[place]:g}", linewidth=1.6
            )
            # Up to the height of the bars only: the legend stands above them.
            largest_norm = part["largest"][0]
            distribution.axvline(largest_norm, 0, 1 / 1.4, color=colour, linestyle=(0, (2, 2)))
        distribution.set_xscale("log")
        distribution.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        distribution.xaxis.set_minor_locator(NullLocator())
        distribution.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        distribution.set_xlabel("Jacobian norm of a training sample (dashed: largest)")
        distribution.set_ylabel("share of the samples")
        distribution.set_ylim(top=1.4 * float(rows["share"].max()))
        distribution.legend(ncols=2)
        for (colour, marker), name in zip(SERIES, ("largest", "median"), strict=False):
            line = rows.average("width", name)
            summary.plot(line.x, line.mean, color=colour, marker=marker, label=name)
        width_axis(summary, widths)
        value_axis(summary)
        summary.set_ylabel("Jacobian norm")
        summary.legend()
    return figure


F7 = Finding(
    "F7",
    "F7-histograms",
    "Distributions of per-sample norms",
    "Is the lower bound the norm of a few extreme samples or of the typical one?",
    "appendix 3.15, figures 29 to 31",
    _collect_histograms,
    _evaluate_histograms,
    _draw_histograms,
)
