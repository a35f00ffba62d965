"""G: bounds at adversarial and out-of-distribution inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from experiments.analysis.perturbation import perturbed_estimates
from experiments.data.perturbations import gaussian_perturbation, pgd
from experiments.drawing import SERIES, Curve, plot_curve, value_axis, width_axis
from experiments.findings.common import LIPSCHITZ, number, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources, Sweep, spread
from experiments.results import Results, Rows

_FCN, _CNN = "C1-width-fcn-ce", "C3-width-cnn"
_WORDS = {_FCN: "FCN", _CNN: "CNN"}
_EPSILON = 0.5
# As in the paper's table: one seed of six networks.
_WIDTHS = 6
_SCALES = (0.1, 0.3, 1.0, 3.0)


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(functional.cross_entropy(model(x).double(), y))


def _row(model: nn.Module, sweep: Sweep, train: Tensor, test: Tensor) -> dict[str, float]:
    found = perturbed_estimates(model, sweep.data.x_train, train)
    return {
        "clean": found.clean,
        "lower": found.perturbed,
        "quotient": found.quotient,
        "mean": found.mean,
        "radius": found.radius,
        "test_loss": _loss(model, test, sweep.data.y_test),
    }


def _perturbed(model: nn.Module, sweep: Sweep) -> Iterator[tuple[str, float, Tensor, Tensor]]:
    data = sweep.data
    yield "clean", 0.0, data.x_train, data.x_test
    attacked = [
        pgd(model, x, y, _EPSILON, norm=2)
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test))
    ]
    yield "attack", _EPSILON, attacked[0], attacked[1]
    # Gaussian noise of standard deviation s has a length of about s sqrt(D).
    root = data.x_train[0].numel() ** 0.5
    for scale in _SCALES:
        yield (
            "noise",
            scale,
            gaussian_perturbation(data.x_train, scale * root, 0),
            gaussian_perturbation(data.x_test, scale * root, 1),
        )


def _collect_robustness(sources: Sources) -> Iterator[dict[str, Any]]:
    for sweep in sources.available([(_FCN, None), (_CNN, None)]):
        seed = min(run.seed for run in sweep.runs)
        widths = spread(sorted({run.width for run in sweep.runs}), _WIDTHS)
        for run in (run for run in sweep.runs if run.seed == seed and run.width in widths):
            model = sweep.model(run)
            for kind, level, train, test in _perturbed(model, sweep):
                about = {"network": sweep.study, "width": run.width, "kind": kind, "level": level}
                yield {**about, **_row(model, sweep, train, test)}


def _changes(rows: Rows) -> np.ndarray[Any, np.dtype[np.float64]]:
    quotient: np.ndarray[Any, np.dtype[np.float64]] = rows["lower"] / rows["clean"]
    return quotient


def _evaluate_robustness(results: Results) -> Outcome:
    checks = []
    there = results.rows.values("network")
    words = {name: word for name, word in _WORDS.items() if name in there}
    table = [("network", "inputs", "bound on them / on the samples", "test loss")]
    for network, word in words.items():
        rows = results.rows.where(network=network)
        attacked = _changes(rows.where(kind="attack"))
        checks.append(
            Check(
                f"{word}: adversarial samples (PGD, radius {_EPSILON:g}) change the lower bound by "
                "less than 25 % at every width",
                "-6 % to +4 % (table 6)",
                f"factors {number(attacked.min())} to {number(attacked.max())}",
                bool((np.abs(attacked - 1) < 0.25).all()),
            )
        )
        noisy = {s: _changes(rows.where(kind="noise", level=s)) for s in _SCALES}
        checks.append(
            Check(
                f"{word}: noise of standard deviation up to {_SCALES[-1]:g} raises the lower bound "
                "by less than 2x at every width",
                "no significant change (figure 15)",
                "largest factors "
                + ", ".join(f"{number(q.max())} at {s:g}" for s, q in noisy.items()),
                max(float(q.max()) for q in noisy.values()) < 2,
            )
        )
        for kind, level in (("clean", 0.0), ("attack", _EPSILON), *(("noise", s) for s in _SCALES)):
            part = rows.where(kind=kind, level=level)
            quotients = _changes(part)
            table.append(
                (
                    word,
                    kind if kind == "clean" else f"{kind}, {level:g}",
                    f"{number(quotients.min())} to {number(quotients.max())}",
                    number(float(part["test_loss"].mean())),
                )
            )
    attack = results.rows.where(kind="attack")
    checks.append(
        Check(
            "the difference quotient along the attack is below the Jacobian norm",
            "straightforward estimate is smaller",
            f"quotient / norm at most {number((attack['quotient'] / attack['lower']).max())}",
            bool((attack["quotient"] < attack["lower"]).all()),
        )
    )
    notes = tuple(f"{word}: not run." for name, word in _WORDS.items() if name not in there)
    largest = float(np.abs(_changes(attack) - 1).max())
    return Outcome(
        tuple(checks),
        f"adversarial inputs change the bound by at most {largest:.0%}",
        notes,
        tuple(table),
    )


def _draw_robustness(results: Results) -> Figure:
    titles = {_FCN: ("FCN", "width (hidden units)"), _CNN: ("CNN", "width (channels)")}
    kinds = (("clean", 0.0), ("attack", _EPSILON), *(("noise", scale) for scale in _SCALES))
    with styled():
        there = results.rows.values("network")
        figure, axes = panels(len(there), width=4.5 * len(there) + 0.6)
        for place, network in zip(axes, there, strict=True):
            title, label = titles[network]
            rows = results.rows.where(network=network)
            for (colour, marker), (kind, level) in zip(SERIES, kinds, strict=False):
                line = rows.where(kind=kind, level=level).average("width", "lower")
                text = {"clean": "training samples", "attack": f"attacked, radius {level:g}"}
                style = "-" if kind != "noise" else "--"
                curve = Curve(text.get(kind, f"noise {level:g}"), colour, marker, style)
                plot_curve(place, line.x, line.mean, None, curve)
            width_axis(place, rows.values("width"), label)
            value_axis(place)
            place.set_title(title)
        axes[0].set_ylabel(f"lower bound, {LIPSCHITZ}")
        axes[0].legend(fontsize=8.5)
    return figure


G = Finding(
    "G",
    "G-robustness",
    "Adversarial and out-of-distribution inputs",
    "Do other inputs than the training samples find much larger Jacobian norms?",
    "section 3.3; appendices 3.2 and 3.3, table 6, figures 14 and 15",
    _collect_robustness,
    _evaluate_robustness,
    _draw_robustness,
)
