"""F5 and F6: dropout, weight decay, spectral constraint, penalty on the lower bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.analysis.rank import rank_correlation
from experiments.drawing import BOUNDS, TEST_LOSS, plot_curve, value_axis
from experiments.findings.common import LIPSCHITZ, final_means, number, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results, Rows

_KEYS = ("dropout", "weight_decay", "spectral_constraint", "lipschitz_penalty")


def _collect_regularisation(sources: Sources) -> Iterator[dict[str, Any]]:
    for sweep in sources.sweeps().values():
        strengths = {key: float(sweep.settings.get(key) or 0.0) for key in _KEYS}
        layers = int(sweep.settings.get("depth") or 1) + 1
        for row in sweep.last_scores():
            yield {**row, **strengths, "layers": layers}


def _series(rows: Rows, key: str) -> Rows:
    """Rows of runs with one regulariser, or with none at all."""
    others = [other for other in _KEYS if other != key]
    return rows.keep(np.all([rows[other] == 0 for other in others], axis=0))


def _fall_check(rows: Rows, key: str, words: str) -> Check:
    line = _series(rows, key).average(key, "lower")
    correlation = rank_correlation(line.x, line.mean)
    return Check(
        f"the lower bound falls with {words}: smaller at the strongest than without, rank "
        "correlation at most -0.8",
        "falls",
        f"{number(line.mean[0])} without, {number(line.mean[-1])} at {number(line.x[-1])}; "
        f"rank correlation {correlation:.2f}",
        bool(line.mean[-1] < line.mean[0]) and correlation <= -0.8,
    )


def _evaluate_decay(results: Results) -> Outcome:
    checks = (
        _fall_check(results.rows, "dropout", "dropout"),
        _fall_check(results.rows, "weight_decay", "weight decay"),
    )
    lines = [_series(results.rows, key).average(key, "lower") for key in _KEYS[:2]]
    shrunk = [number(float(line.mean[-1] / line.mean[0])) for line in lines]
    return Outcome(
        checks, f"lower bound at the strongest: dropout {shrunk[0]}x, weight decay {shrunk[1]}x"
    )


def _draw_pair(results: Results, keys: dict[str, str]) -> Figure:
    with styled():
        figure, axes = panels(len(keys))
        for place, (key, label) in zip(axes, keys.items(), strict=True):
            rows = _series(results.rows, key)
            for name, curve in {**BOUNDS, "test_loss": TEST_LOSS}.items():
                line = rows.average(key, name)
                plot_curve(place, np.arange(len(line.x)), line.mean, line.std, curve)
            strengths = rows.values(key)
            names = ["none" if value == 0 else f"{value:g}" for value in strengths]
            place.set_xticks(range(len(strengths)), names)
            place.set_xlabel(label)
            value_axis(place)
        axes[0].set_ylabel(f"{LIPSCHITZ}, loss")
        axes[1].legend()
    return figure


F5 = Finding(
    "F5",
    "F5-dropout-decay",
    "Dropout and weight decay",
    "Do the usual regularisers make the lower bound smaller?",
    "appendices 3.21 and 3.23, figures 53 and 55",
    _collect_regularisation,
    _evaluate_decay,
    lambda results: _draw_pair(
        results, {"dropout": "dropout probability", "weight_decay": "weight decay"}
    ),
)


def _evaluate_constraint(results: Results) -> Outcome:
    rows = results.rows
    constrained = rows.keep(rows["spectral_constraint"] > 0)
    limits = constrained["spectral_constraint"] ** constrained["layers"]
    quotients = constrained["upper"] / limits
    chance = math.log(10)
    free = _series(rows, "spectral_constraint")
    loss = free.average("spectral_constraint", "test_loss")
    penalised = _series(rows, "lipschitz_penalty")
    strengths = penalised.values("lipschitz_penalty")
    start, end = (
        final_means(penalised.where(lipschitz_penalty=value), ("lower", "upper", "test_loss"))
        for value in (strengths[0], strengths[-1])
    )
    checks = (
        Check(
            "the upper bound of constrained networks is at most the constraint to the power of "
            "the number of layers (1 % for rounding)",
            "by construction",
            f"{number(quotients.min())} to {number(quotients.max())} times that",
            bool(quotients.max() <= 1.01),
        ),
        Check(
            "constrained networks still learn: training loss below log 10, that of a constant",
            "trained to the end",
            f"training loss {number(constrained['train_loss'].min())} to "
            f"{number(constrained['train_loss'].max())}",
            bool(constrained["train_loss"].max() < chance),
        ),
        Check(
            "the constraint lowers the test loss",
            "test loss follows the bounds",
            f"{number(loss.mean[0])} without, smallest {number(loss.mean[1:].min())}",
            bool(loss.mean[1:].min() < loss.mean[0]),
        ),
        Check(
            "the penalty lambda C_lower lowers the lower bound",
            "figure 32",
            f"{number(start['lower'])} without, {number(end['lower'])} at lambda "
            f"{number(strengths[-1])}",
            end["lower"] < start["lower"],
        ),
        Check(
            "the penalty lowers the test loss",
            "a positive effect",
            f"{number(start['test_loss'])} without, {number(end['test_loss'])}",
            end["test_loss"] < start["test_loss"],
        ),
        Check(
            "the penalty changes the upper bound less than the lower bound (as factors)",
            "almost no change in the upper bound",
            f"upper {number(end['upper'] / start['upper'])}x, "
            f"lower {number(end['lower'] / start['lower'])}x",
            abs(np.log(end["upper"] / start["upper"])) < abs(np.log(end["lower"] / start["lower"])),
        ),
    )
    return Outcome(
        checks,
        f"penalty: lower bound {number(end['lower'] / start['lower'])}x, "
        f"test loss {number(end['test_loss'] / start['test_loss'])}x",
    )


F6 = Finding(
    "F6",
    "F6-constraint",
    "Spectral constraint, and the lower bound as a penalty",
    "What does it do to loss and bounds to hold one of the bounds down?",
    "appendices 3.12 and 3.16, figures 28 and 32",
    _collect_regularisation,
    _evaluate_constraint,
    lambda results: _draw_pair(
        results,
        {
            "spectral_constraint": "largest spectral norm of a layer",
            "lipschitz_penalty": "penalty on the lower bound, lambda",
        },
    ),
)
