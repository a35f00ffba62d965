"""F1: cross-entropy, squared error, and the softmax of a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

import lipfast
from experiments.drawing import SERIES, Curve, plot_curve, time_axis
from experiments.findings.common import (
    draw_variants_over_time,
    final_means,
    number,
    panels,
    styled,
    variants,
)
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources, spread
from experiments.results import Results

_LOSS_CHECKPOINTS = 12


def _collect_losses(sources: Sources) -> Iterator[dict[str, Any]]:
    sweeps = sources.sweeps()
    for sweep in sweeps.values():
        yield from sweep.scores()
    # Not another training: the softmax of the network that was trained with cross-entropy.
    sweep = sweeps["ce"]
    epochs = {(row["width"], row["seed"], row["step"]): row["epoch"] for row in sweep.scores()}
    for run in sweep.runs:
        for step in spread(list(run.steps), _LOSS_CHECKPOINTS):
            model = nn.Sequential(sweep.model(run, step), nn.Softmax(dim=-1)).eval()
            norms = lipfast.jacobian_norms(model, sweep.data.x_train)
            yield {
                "study": sweep.study,
                "variant": "softmax of ce",
                "width": run.width,
                "seed": run.seed,
                "step": step,
                "epoch": epochs[run.width, run.seed, step],
                "lower": float(norms.max()),
                "mean": float(norms.mean()),
            }


def _evaluate_losses(results: Results) -> Outcome:
    rows = results.rows
    ce = final_means(rows.where(variant="ce"), ("lower", "upper"))
    mse = final_means(rows.where(variant="mse"), ("lower", "upper"))
    softmax = final_means(rows.where(variant="softmax of ce"), ("lower",))
    checks = (
        Check(
            "squared error gives smaller bounds than cross-entropy",
            "marginally lower",
            f"lower {number(mse['lower'])} against {number(ce['lower'])}, "
            f"upper {number(mse['upper'])} against {number(ce['upper'])}",
            mse["lower"] < ce["lower"] and mse["upper"] < ce["upper"],
        ),
        Check(
            "softmax after the network shrinks the lower bound at least to a third",
            "shrinks dramatically",
            f"{number(softmax['lower'])} against {number(ce['lower'])}",
            softmax["lower"] <= ce["lower"] / 3,
        ),
    )
    return Outcome(
        checks,
        f"lower bound: CE {number(ce['lower'])}, MSE {number(mse['lower'])}, "
        f"softmax of CE {number(softmax['lower'])}",
    )


_LABELS = {
    "ce": "cross-entropy",
    "mse": "squared error",
    "ce-softmax": "cross-entropy of the softmax",
    "nll-softmax": "softmax inside the network",
    "softmax of ce": "softmax of the CE network",
}


def _draw_losses(results: Results) -> Figure:
    with styled():
        figure, (lower, loss) = panels(2)
        draw_variants_over_time(lower, results, "lower", lambda name: _LABELS.get(name, name))
        lower.set_ylabel("lower bound (2-norm)")
        for (colour, marker), name in zip(SERIES, variants(results), strict=False):
            line = results.rows.where(variant=name).average("epoch", "test_error")
            if len(line.x):
                plot_curve(loss, line.x, line.mean, line.std, Curve(name, colour, marker))
        time_axis(loss, np.array(results.rows.values("epoch")))
        loss.set_ylabel("test error (fraction)")
        handles, labels = lower.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


F1 = Finding(
    "F1",
    "F1-losses",
    "The loss function",
    "Does the loss change the Lipschitz constant?",
    "appendix 3.17, figures 33 and 34",
    _collect_losses,
    _evaluate_losses,
    _draw_losses,
)
