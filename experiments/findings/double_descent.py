"""C1 to C4: test loss and bounds against width."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.analysis.double_descent import find_inner_peak, find_peak
from experiments.analysis.peaks import PeakAlignment, peak_alignment
from experiments.drawing import (
    BOUNDS,
    TEST_LOSS,
    TRAIN_LOSS,
    mark_vertical,
    plot_curve,
    ring,
    value_axis,
    width_axis,
)
from experiments.findings.common import LIPSCHITZ, number, styled, variants
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results, Rows

_IN_WORDS = {
    "test_loss": "test loss",
    "lower": "lower bound",
    "upper": "upper bound",
    "mean": "mean Jacobian norm",
    "path_length": "path length",
}


def _collect_widths(sources: Sources) -> Iterator[dict[str, Any]]:
    for sweep in sources.sweeps().values():
        labels = sweep.data.y_train
        chance = 1 - float(torch.bincount(labels).max()) / len(labels)
        for row in sweep.last_scores():
            yield {**row, "chance_error": chance}


def learnt(rows: Rows) -> NDArray[np.bool_]:
    """Which networks err less often than one that always names the commonest training label."""
    if "chance_error" not in rows:
        return np.ones(len(rows), dtype=bool)
    within: NDArray[np.bool_] = rows["train_error"] < rows["chance_error"] - 1e-9
    return within


def fitting_width(rows: Rows) -> int | None:
    """The smallest width from which on every run fits its training labels, if there is one."""
    widths = rows.values("width")
    fits = [bool((rows.where(width=width)["train_error"] == 0).all()) for width in widths]
    for place in range(len(widths)):
        if all(fits[place:]):
            return int(widths[place])
    return None


def finite_widths(rows: Rows, names: Sequence[str]) -> Rows:
    """Leave out widths at which a quantity is not finite for any run."""
    kept = [
        width
        for width in rows.values("width")
        if all(np.isfinite(rows.where(width=width)[name]).any() for name in names)
    ]
    return rows.keep(np.isin(rows["width"], kept))


def peak_check(rows: Rows, name: str, paper: str) -> Check:
    """Whether a quantity rises to a peak inside the range of widths and falls again."""
    line = rows.average("width", name)
    peak = find_peak(line.mean)
    return Check(
        f"{_IN_WORDS[name]} peaks inside the range of widths, at least 1.1x above both sides",
        paper,
        f"peak at width {line.x[peak.index]:g}: {number(peak.rise)}x above the lowest point "
        f"before, {number(peak.fall)}x above the lowest after",
        peak.visible(),
    )


def _dead_notes(rows: Rows) -> list[str]:
    """What the curves are without networks that have learnt nothing; empty if there are none."""
    alive = learnt(rows)
    if alive.all() or not alive.any():
        return []
    widths = ", ".join(f"{width:g}" for width in sorted(set(rows["width"][~alive])))
    kept = rows.keep(alive)
    names = [n for n in ("test_loss", "lower", "upper") if np.isfinite(kept[n]).all()]
    peaks = "; ".join(f"{_IN_WORDS[n]}: {peak_check(kept, n, '').ours}" for n in names)
    aligned = "; ".join(f"{_IN_WORDS[n]}: {alignment_check(kept, n).ours}" for n in names[1:])
    return [
        f"{(~alive).sum()} of {len(alive)} networks (widths: {widths}) learnt nothing: their "
        "training error is that of always naming one class. They count in the criteria above. "
        f"Without them (dotted in the figure): {peaks}. Alignment without them: {aligned}."
    ]


def _inner_note(rows: Rows) -> list[str]:
    """Where the test loss peaks inside the range, if it is largest at an end."""
    line = rows.average("width", "test_loss")
    if 0 < find_peak(line.mean).index < len(line.mean) - 1:
        return []
    inner = find_inner_peak(line.mean)
    if inner is None:
        return ["The test loss has no local maximum inside the range of widths."]
    return [
        "The test loss is largest at an end of the range of widths. Inside, it has a local "
        f"maximum at width {line.x[inner.index]:g}, {number(inner.rise)}x above the lowest point "
        f"before and {number(inner.fall)}x above the lowest after."
    ]


def align(rows: Rows, name: str, reference: str = "test_loss") -> PeakAlignment:
    """Alignment of a quantity's peak with that of the test loss."""
    rows = finite_widths(rows, (reference, name))
    widths, first = rows.by_seed("width", reference)
    _, second = rows.by_seed("width", name)
    return peak_alignment(widths, first, second)


def alignment_check(rows: Rows, name: str, paper: str = "same width") -> Check:
    """Whether a quantity peaks at the width of the test loss or next to it."""
    found = align(rows, name)
    return Check(
        f"{_IN_WORDS[name]} peaks at the width of the test loss or a neighbouring one",
        paper,
        f"width {found.width} against {found.reference}: {found.octaves:+.2f} octaves, "
        f"{found.confidence:.0%} bootstrap interval over {found.seeds} seeds "
        f"[{found.low:+.2f}, {found.high:+.2f}]",
        found.aligned,
    )


def _evaluate_sweep(rows: Rows) -> Outcome:
    bounds = [name for name in ("lower", "upper") if np.isfinite(rows[name]).all()]
    checks = [peak_check(rows, name, "visible") for name in ("test_loss", *bounds)]
    checks += [alignment_check(rows, name) for name in bounds]
    found = {name: align(rows, name) for name in bounds}
    peaks = ", ".join(f"{_IN_WORDS[name]} {alignment.width}" for name, alignment in found.items())
    fits = fitting_width(rows)
    notes = [
        f"Every run fits its training labels from width {fits} on."
        if fits is not None
        else "No width of the sweep fits all training labels with every seed."
    ]
    if len(bounds) < 2:
        notes.append("The upper bound is infinite: attention has no global Lipschitz constant.")
    notes.append(f"The mean Jacobian norm peaks at width {align(rows, 'mean').width}.")
    notes += _inner_note(rows) + _dead_notes(rows)
    reference = next(iter(found.values())).reference
    return Outcome(tuple(checks), f"peak widths: test loss {reference}, {peaks}", tuple(notes))


def evaluate_widths(results: Results) -> Outcome:
    """Peaks of test loss and bounds, and their alignment, for every variant."""
    names = variants(results)
    outcomes = [_evaluate_sweep(results.rows.where(variant=name)) for name in names]
    prefixes = [f"{name}: " if name else "" for name in names]
    checks = [
        dataclasses.replace(check, claim=prefix + check.claim)
        for prefix, outcome in zip(prefixes, outcomes, strict=True)
        for check in outcome.checks
    ]
    notes = [
        prefix + note
        for prefix, outcome in zip(prefixes, outcomes, strict=True)
        for note in outcome.notes
    ]
    return Outcome(tuple(checks), prefixes[0] + outcomes[0].headline, tuple(notes))


def draw_widths(results: Results, label: str = "width (hidden units)") -> Figure:
    """Losses and bounds against width, peaks ringed, the fitting width dashed; a row a variant."""
    names = variants(results)
    with styled():
        figure = Figure(figsize=(9.0, 3.6 * len(names)), layout="constrained")
        places = np.atleast_2d(figure.subplots(len(names), 2))
        for (losses, bounds), name in zip(places, names, strict=True):
            _draw_sweep(losses, bounds, results.rows.where(variant=name), label)
            losses.set_title(name)
    return figure


def _draw_sweep(losses: Axes, bounds: Axes, rows: Rows, label: str) -> None:
    for axes, curves in (
        (losses, {"test_loss": TEST_LOSS, "train_loss": TRAIN_LOSS}),
        (bounds, BOUNDS),
    ):
        for name, curve in curves.items():
            if not np.isfinite(rows[name]).all():
                continue
            line = rows.average("width", name)
            plot_curve(axes, line.x, line.mean, line.std, curve)
            if name in {"test_loss", "lower", "upper"}:
                top = int(np.argmax(line.mean))
                ring(axes, line.x[top], line.mean[top])
                _draw_learnt(axes, rows, name, curve.colour)
        width_axis(axes, rows.values("width"), label)
        value_axis(axes)
        mark_vertical(axes, fitting_width(rows))
        axes.legend()
    losses.set_ylabel("loss")
    bounds.set_ylabel(LIPSCHITZ)


def _draw_learnt(axes: Axes, rows: Rows, name: str, colour: str) -> None:
    """Draw, dotted, the mean without networks that have learnt nothing."""
    alive = learnt(rows)
    if not alive.all() and alive.any():
        line = rows.keep(alive).average("width", name)
        axes.plot(line.x, line.mean, ":", color=colour)


def _study(
    identifier: str, name: str, title: str, source: str, label: str = "width (hidden units)"
) -> Finding:
    return Finding(
        identifier,
        name,
        title,
        "Do both bounds show the double descent of the test loss when the network grows?",
        source,
        _collect_widths,
        evaluate_widths,
        lambda results: draw_widths(results, label),
    )


C1 = _study(
    "C1",
    "C1-width-fcn-ce",
    "Width of a fully connected network, cross-entropy",
    "appendix 3.9, figure 22",
)
C2 = _study(
    "C2",
    "C2-width-fcn-mse",
    "Width of a fully connected network, squared error",
    "appendix 3.9, figure 23",
)
C3 = _study(
    "C3",
    "C3-width-cnn",
    "Width of a convolutional network, label noise",
    "section 4, figure 5; appendix 3.9, figures 24 and 25",
    "width (channels of the first layer)",
)
C4 = _study(
    "C4",
    "C4-width-vit",
    "Width of a vision transformer",
    "appendix 3.9, figure 26",
    "width (embedding dimension)",
)
