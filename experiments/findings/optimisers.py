"""F2, X1, X2, X3: optimisers, learning rates, batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.analysis.path_length import path_length
from experiments.analysis.power_law import fit_power_law
from experiments.analysis.rank import rank_correlation
from experiments.drawing import BOUNDS, TEST_LOSS, Curve, plot_curve, value_axis
from experiments.findings.common import (
    LIPSCHITZ,
    draw_final_bounds,
    draw_variants_over_time,
    final_means,
    last_rows,
    number,
    numbers,
    panels,
    styled,
    variants,
)
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results

_QUANTITIES = ("lower", "upper")
_COMPARED = ("lower", "upper", "checkpoint_path")


def _collect_optimisers(sources: Sources) -> Iterator[dict[str, Any]]:
    """Scores of all checkpoints, with the path length along them, as the paper measures it.

    Along the updates SGD's path is mostly the noise of its mini-batches.
    """
    for sweep in sources.sweeps().values():
        paths: dict[tuple[int, int, int], float] = {}
        for run in sweep.runs:
            lengths = path_length(sweep.model(run, step).state_dict() for step in run.steps)
            for step, length in zip(run.steps, lengths, strict=True):
                paths[run.width, run.seed, step] = length
        for row in sweep.scores():
            path = paths.get((row["width"], row["seed"], row["step"]))
            yield {**row, "checkpoint_path": path}


def _evaluate_optimisers(results: Results) -> Outcome:
    rows = results.rows
    sgd, adam = (final_means(rows.where(variant=v), _COMPARED) for v in ("sgd", "adam"))
    ratios = {name: adam[name] / sgd[name] for name in _COMPARED}
    trained = rows.keep((rows["step"] > 0) & np.isfinite(rows["checkpoint_path"]))
    correlation = rank_correlation(trained["checkpoint_path"], trained["lower"])
    words = {"lower": "lower bound", "upper": "upper bound", "checkpoint_path": "path length"}
    checks = [
        Check(
            f"after as many epochs the {words[name]} is at least twice as large with Adam",
            "escalates dramatically" if name != "checkpoint_path" else "travels farther",
            f"{number(adam[name])} against {number(sgd[name])}: {number(ratios[name])}x",
            ratios[name] >= 2,
        )
        for name in _COMPARED
    ]
    checks.append(
        Check(
            "over all optimisers and checkpoints the lower bound follows the path length: rank "
            "correlation at least 0.9",
            "similar trend",
            f"{correlation:.2f}",
            correlation >= 0.9,
        )
    )
    ends = ("train_loss", "path_length")
    losses = {v: final_means(rows.where(variant=v), ends) for v in ("sgd", "adam")}
    return Outcome(
        tuple(checks),
        f"Adam over SGD: lower {number(ratios['lower'])}x, upper {number(ratios['upper'])}x, "
        f"path {number(ratios['checkpoint_path'])}x",
        (
            f"Training losses at the end: SGD {number(losses['sgd']['train_loss'])}, "
            f"Adam {number(losses['adam']['train_loss'])}; X3 compares at equal loss.",
            "The path length is that along the checkpoints, as in the paper. Along single updates "
            f"it is {number(losses['sgd']['path_length'])} for SGD, with its mini-batch noise, and "
            f"{number(losses['adam']['path_length'])} for Adam.",
        ),
    )


def _draw_optimisers(results: Results) -> Figure:
    with styled():
        figure, axes = panels(3, width=10.5)
        names = ("lower", "upper", "checkpoint_path")
        for place, name in zip(axes, names, strict=True):
            draw_variants_over_time(place, results, name)
            place.set_ylabel({"checkpoint_path": "path length"}.get(name, f"{name} bound"))
        axes[0].legend()
    return figure


F2 = Finding(
    "F2",
    "F2-optimisers",
    "The optimiser",
    "Does Adam end at larger Lipschitz constants than SGD?",
    "appendix 3.18, figures 36 to 41",
    _collect_optimisers,
    _evaluate_optimisers,
    _draw_optimisers,
)


def _evaluate_equal_loss(results: Results) -> Outcome:
    names = variants(results)
    ends = {
        name: final_means(results.rows.where(variant=name), ("train_loss", *_QUANTITIES))
        for name in names
    }
    losses = [end["train_loss"] for end in ends.values()]
    lower = {name: number(end["lower"]) for name, end in ends.items()}
    upper = {name: number(end["upper"]) for name, end in ends.items()}
    checks = (
        Check(
            "the networks are compared at training losses within 20 % of each other",
            "-",
            ", ".join(f"{name} {number(end['train_loss'])}" for name, end in ends.items()),
            max(losses) <= 1.2 * min(losses),
        ),
        Check(
            "at equal training loss Adam's lower bound is at least 1.1x SGD's",
            "larger at the last epochs (figure 37)",
            ", ".join(f"{name} {value}" for name, value in lower.items()),
            ends["adam"]["lower"] >= 1.1 * ends["sgd"]["lower"],
        ),
        Check(
            "at equal training loss Adam's upper bound is at least 1.1x SGD's",
            "larger at the last epochs (figure 37)",
            ", ".join(f"{name} {value}" for name, value in upper.items()),
            ends["adam"]["upper"] >= 1.1 * ends["sgd"]["upper"],
        ),
    )
    ratio = ends["adam"]["lower"] / ends["sgd"]["lower"]
    return Outcome(checks, f"Adam over SGD at equal loss: lower {number(ratio)}x")


def _draw_equal_loss(results: Results) -> Figure:
    names = variants(results)
    with styled():
        figure, (axes,) = panels(1, width=5.6)
        draw_final_bounds(axes, results, names, names)
        axes.legend()
    return figure


X3 = Finding(
    "X3",
    "X3-equal-loss",
    "Beyond the paper: optimisers at equal training loss",
    "Is Adam's larger Lipschitz constant only faster training?",
    "beyond the paper",
    last_rows,
    _evaluate_equal_loss,
    _draw_equal_loss,
)


def _collect_with(key: str) -> Any:
    def collect(sources: Sources) -> Iterator[dict[str, Any]]:
        for sweep in sources.sweeps().values():
            value = sweep.settings[key]
            if not isinstance(value, int | float):
                value = sweep.settings["train_size"]
            for row in sweep.last_scores():
                yield {**row, key: float(value)}

    return collect


def _evaluate_with(key: str, words: str) -> Any:
    def evaluate(results: Results) -> Outcome:
        rows = results.rows
        slopes = {}
        for name in ("lower", "upper"):
            line = rows.average(key, name)
            slopes[name] = fit_power_law(line.x, line.mean)
        values = rows.values(key)
        checks = tuple(
            Check(
                f"the {name} bound depends on the {words}: |slope| of the power law above 0.1",
                "-",
                f"slope {fit.slope:+.3f} (R^2 {fit.r_squared:.2f}) from {number(values[0])} to "
                f"{number(values[-1])}",
                abs(fit.slope) > 0.1,
            )
            for name, fit in slopes.items()
        )
        line = rows.average(key, "test_loss")
        best = line.x[int(np.argmin(line.mean))]
        train = numbers(rows.average(key, "train_loss").mean)
        return Outcome(
            checks,
            f"slope of the lower bound in the {words}: {slopes['lower'].slope:+.3f}",
            (
                f"The test loss is smallest at {number(best)}.",
                f"The runs make equally many updates and end at different training losses: {train} "
                f"at {numbers(line.x)}.",
            ),
        )

    return evaluate


def _draw_with(key: str, words: str) -> Any:
    def draw(results: Results) -> Figure:
        rows = results.rows
        with styled():
            figure, (bounds, loss) = panels(2)
            for axes, curves in (
                (bounds, BOUNDS),
                (
                    loss,
                    {"test_loss": TEST_LOSS, "path_length": Curve("path length", "#E69F00", "s")},
                ),
            ):
                for name, curve in curves.items():
                    line = rows.average(key, name)
                    if len(line.x):
                        plot_curve(axes, line.x, line.mean, line.std, curve)
                axes.set_xscale("log")
                axes.set_xticks(rows.values(key), [f"{value:g}" for value in rows.values(key)])
                axes.set_xticks([], minor=True)
                value_axis(axes)
                axes.set_xlabel(words)
                axes.legend()
            bounds.set_ylabel(LIPSCHITZ)
            loss.set_ylabel("loss, length")
        return figure

    return draw


def _swept(identifier: str, name: str, key: str, words: str) -> Finding:
    return Finding(
        identifier,
        name,
        f"Beyond the paper: the {words}",
        f"How do the bounds at the end of training depend on the {words}?",
        "beyond the paper, which names it as future work",
        _collect_with(key),
        _evaluate_with(key, words),
        _draw_with(key, words),
    )


X1 = _swept("X1", "X1-learning-rate", "lr", "learning rate")
X2 = _swept("X2", "X2-batch-size", "batch_size", "batch size")
