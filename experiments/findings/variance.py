"""D: bias and variance of the test loss, and the Lipschitz bound on the variance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from experiments.analysis.bias_variance import (
    decompose,
    seed_averaged_norms,
    variance_at,
    variance_bound,
)
from experiments.analysis.double_descent import Peak, find_peak
from experiments.analysis.rank import rank_correlation
from experiments.drawing import TEST_LOSS, Curve, plot_curve, ring, value_axis, width_axis
from experiments.findings.common import number, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results, Rows

_C2 = "C2-width-fcn-mse"


def _targets(labels: Tensor, classes: int, scale: float) -> Tensor:
    return functional.one_hot(labels, classes).double() * scale


def _collect_variance(sources: Sources) -> Iterator[dict[str, Any]]:
    sweep = sources.sweep(_C2)
    scale = float(sweep.settings.get("target_scale", 1.0))
    scores = {(row["width"], row["seed"]): row for row in sweep.last_scores()}
    x, labels = sweep.data.x_test, sweep.data.y_test
    for width in sorted({run.width for run in sweep.runs}):
        runs = [run for run in sweep.runs if run.width == width and (width, run.seed) in scores]
        if len(runs) < 2:
            continue
        models = [sweep.model(run) for run in runs]
        with torch.no_grad():
            outputs = torch.stack([model(x) for model in models])
        parts = decompose(outputs, _targets(labels, outputs.shape[2], scale))
        lower = [scores[width, run.seed]["lower"] for run in runs]
        upper = [scores[width, run.seed]["upper"] for run in runs]
        ensemble = float(seed_averaged_norms(models, sweep.data.x_train).max())
        origin, centre = torch.zeros_like(x[0]), x.mean(dim=0)
        yield {
            "study": _C2,
            "width": width,
            "seeds": len(runs),
            "bias": parts.bias,
            "variance": parts.variance,
            "test_loss": parts.loss,
            "ensemble": ensemble,
            "estimate": variance_bound(ensemble, lower, x, variance_at(models, origin)),
            "centred": variance_bound(
                ensemble, lower, x, variance_at(models, centre), around="mean"
            ),
            # The norm of a mean of Jacobians is at most the mean of the networks' constants.
            "certified": variance_bound(
                sum(upper) / len(upper), upper, x, variance_at(models, origin)
            ),
        }


def _shape_checks(rows: Rows, loss: Peak, variance: Peak) -> tuple[Check, ...]:
    """How far the variance makes the shape of the test loss over the widths."""
    widths = rows["width"]
    shares = [
        float(
            (rows["variance"][loss.index] - rows["variance"][end])
            / (rows["test_loss"][loss.index] - rows["test_loss"][end])
        )
        for end in (0, -1)
    ]
    swing = {name: float(rows[name].max() / rows[name].min()) for name in ("bias", "variance")}
    share = float(rows["variance"][loss.index] / rows["test_loss"][loss.index])
    return (
        Check(
            "the variance peaks at the width of the test loss or a neighbouring one",
            "the variance carries the peak",
            f"width {widths[variance.index]:g} against {widths[loss.index]:g}; there the variance "
            f"is {share:.0%} of the loss",
            abs(variance.index - loss.index) <= 1 and variance.visible(),
        ),
        Check(
            "the rise and the fall of the test loss are more than half the variance's each",
            "the shape is mostly governed by the variance",
            f"rise {shares[0]:.0%}, fall {shares[1]:.0%}",
            min(shares) > 0.5,
        ),
        Check(
            "the bias is almost constant across widths: largest over smallest below 1.25",
            "almost constant",
            f"{number(swing['bias'])} (variance: {number(swing['variance'])})",
            swing["bias"] < 1.25,
        ),
    )


def _bound_checks(rows: Rows) -> tuple[Check, ...]:
    """Whether Lipschitz constants bound the variance, and how well."""
    correlation = rank_correlation(rows["estimate"], rows["variance"])
    return (
        Check(
            "the bound with upper bounds as constants, where it is a theorem, is above the "
            "variance at every width",
            "by the theorem",
            f"bound / variance at least {number((rows['certified'] / rows['variance']).min())}",
            bool((rows["certified"] >= rows["variance"]).all()),
        ),
        Check(
            "with lower bounds as constants it still lies above the variance at every width",
            "loose, but above",
            f"at least {number(float((rows['estimate'] / rows['variance']).min()))} times",
            bool((rows["estimate"] >= rows["variance"]).all()),
        ),
        Check(
            "the estimate follows the variance over the widths: rank correlation at least 0.8",
            "trends align",
            f"{correlation:.2f}",
            correlation >= 0.8,
        ),
    )


def _evaluate_variance(results: Results) -> Outcome:
    rows = results.rows
    widths = rows["width"]
    loss, variance = find_peak(rows["test_loss"]), find_peak(rows["variance"])
    gain = float(np.mean(rows["centred"] / rows["estimate"]))
    return Outcome(
        (*_shape_checks(rows, loss, variance), *_bound_checks(rows)),
        f"variance peaks at width {widths[variance.index]:g}, test loss at {widths[loss.index]:g}",
        (
            f"Around the mean of the test inputs instead of zero (appendix 3.13) the estimate is "
            f"{number(gain)} times as large.",
        ),
    )


_CURVES = {
    "test_loss": TEST_LOSS,
    "variance": Curve("variance", "#0072B2", "^"),
    "bias": Curve("bias (squared)", "#009E73", "D", "--"),
}
_BOUNDED = {
    "certified": Curve("bound, from upper bounds (a theorem)", "#000000", "v"),
    "estimate": Curve("bound, from lower bounds (the paper's)", "#E69F00", "s"),
    "variance": Curve("variance", "#0072B2", "^"),
}


def _draw_variance(results: Results) -> Figure:
    rows = results.rows
    with styled():
        figure, (split, bound) = panels(2)
        for axes, curves in ((split, _CURVES), (bound, _BOUNDED)):
            for name, curve in curves.items():
                plot_curve(axes, rows["width"], rows[name], None, curve)
            top = int(np.argmax(rows["variance"]))
            ring(axes, rows["width"][top], rows["variance"][top])
            width_axis(axes, rows.values("width"))
            value_axis(axes)
            axes.legend()
        split.set_ylabel("squared loss and its parts")
        bound.set_ylabel("variance and its bounds")
    return figure


D = Finding(
    "D",
    "D-bias-variance",
    "Bias, variance and the Lipschitz constant",
    "Does the variance over seeds carry the double descent, and do Lipschitz constants bound it?",
    "section 4 and appendices 3.11, 3.13, 4.2",
    _collect_variance,
    _evaluate_variance,
    _draw_variance,
)
