"""C5 and A6: bounds at initialisation; the path length of training against width."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.analysis.power_law import fit_power_law
from experiments.drawing import BOUNDS, LOWER, TEST_LOSS, Curve, plot_curve, value_axis, width_axis
from experiments.findings.common import LIPSCHITZ, last_rows, number, panels, styled, variants
from experiments.findings.double_descent import C1, align, alignment_check, peak_check
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results

_PATH = Curve("path length of the parameters", "#E69F00", "s")


def _collect_initialisation(sources: Sources) -> Iterator[dict[str, Any]]:
    for row in last_rows(sources):
        yield {**row, "kind": "start"}
    for row in sources.sweep(C1.name).last_scores():
        yield {**row, "kind": "trained"}


def _slope_check(results: Results, name: str, *, rises: bool) -> Check:
    line = results.rows.where(kind="start").average("width", name)
    fit = fit_power_law(line.x, line.mean)
    claim = f"at initialisation the {name} bound " + (
        "rises with the width" if rises else "does not rise with the width (slope below 0.05)"
    )
    return Check(
        claim,
        "figure 51" if rises else "the trend of trained networks does not hold",
        f"slope {fit.slope:.2f} (R^2 {fit.r_squared:.2f})",
        fit.slope > 0.05 if rises else fit.slope < 0.05,
    )


def _evaluate_initialisation(results: Results) -> Outcome:
    trained = results.rows.where(kind="trained")
    checks = [
        _slope_check(results, "lower", rises=False),
        _slope_check(results, "upper", rises=True),
        peak_check(trained, "path_length", "visible (figure 44)"),
        alignment_check(trained, "path_length", "double descent too"),
    ]
    found = align(trained, "path_length")
    return Outcome(
        tuple(checks), f"peak of the path length: width {found.width} (test loss {found.reference})"
    )


def _draw_initialisation(results: Results) -> Figure:
    start, trained = (results.rows.where(kind=kind) for kind in ("start", "trained"))
    with styled():
        figure, (initial, path) = panels(2)
        for name, curve in BOUNDS.items():
            line = start.average("width", name)
            plot_curve(initial, line.x, line.mean, line.std, curve)
        width_axis(initial, start.values("width"))
        value_axis(initial)
        initial.set_title("at initialisation")
        initial.set_ylabel(LIPSCHITZ)
        initial.legend()
        for name, curve in {"path_length": _PATH, "lower": LOWER, "test_loss": TEST_LOSS}.items():
            line = trained.average("width", name)
            plot_curve(path, line.x, line.mean, line.std, curve)
        width_axis(path, trained.values("width"))
        value_axis(path)
        path.set_title("after training")
        path.set_ylabel("path length, bound, loss")
        path.legend()
    return figure


C5 = Finding(
    "C5",
    "C5-initialisation",
    "Bounds at initialisation, and path length, against width",
    "Is the double descent there at initialisation, or does training make it?",
    "appendices 3.18 and 3.19, figures 44 and 51",
    _collect_initialisation,
    _evaluate_initialisation,
    _draw_initialisation,
)


def _log10_upper(results: Results, variant: str) -> float:
    rows = results.rows.where(variant=variant).last()
    return float(np.nanmean(rows["log_upper"])) / math.log(10)


def _evaluate_deep(results: Results) -> Outcome:
    checks = []
    for variant in variants(results):
        rows = results.rows.where(variant=variant).last()
        lower, log_upper = float(np.nanmean(rows["lower"])), _log10_upper(results, variant)
        if np.isfinite(log_upper):
            checks.append(
                Check(
                    f"{variant}: at initialisation the upper bound exceeds the lower one by more "
                    "than ten orders of magnitude",
                    "upper about 1e27",
                    f"upper 1e{log_upper:.1f}, lower {number(lower)}",
                    log_upper - np.log10(lower) > 10,
                )
            )
        else:
            checks.append(
                Check(
                    f"{variant}: attention has no finite upper bound on all inputs",
                    "none",
                    f"upper infinite, lower {number(lower)}",
                    True,
                )
            )
    return Outcome(tuple(checks), f"{variants(results)[0]}: {checks[0].ours}")


def _draw_deep(results: Results) -> Figure:
    names = variants(results)
    places = np.arange(len(names))
    with styled():
        figure, (axes,) = panels(1, width=5.6)
        for name, curve in BOUNDS.items():
            logs = []
            for variant in names:
                rows = results.rows.where(variant=variant).last()
                upper = _log10_upper(results, variant)
                logs.append(upper if name == "upper" else float(np.log10(rows[name].mean())))
            finite = np.isfinite(logs)
            shown = np.array(logs)[finite]
            beside = places[finite] + {"upper": 0.0, "lower": -0.06, "mean": 0.06}[name]
            axes.plot(beside, shown, curve.marker, color=curve.colour, label=curve.label)
        axes.set_xticks(places, names)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylabel("log10 of the bound")
        axes.legend()
    return figure


A6 = Finding(
    "A6",
    "A6-imagenet",
    "Deep networks at initialisation",
    "How loose is the product of layer norms in a deep network?",
    "section 3.2, figure 3",
    last_rows,
    _evaluate_deep,
    _draw_deep,
)
