"""A1 to A4, X4: bounds along training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from experiments.analysis.position import relative_position
from experiments.analysis.power_law import PowerLaw, fit_power_law
from experiments.analysis.searches import (
    ascended_lower_bound,
    effective_lower_bound,
    pairwise_lower_bound,
)
from experiments.drawing import BOUNDS, LOWER, UPPER, Curve
from experiments.findings.common import (
    LIPSCHITZ,
    all_rows,
    draw_bounds_over_time,
    number,
    panels,
    styled,
    variants,
)
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources, Sweep, spread
from experiments.results import Results, Rows

_A1 = "A1-evolution"
_EVOLUTION_CHECKPOINTS = 12
# A value in the lower third between the bounds, on a logarithmic scale, is "much nearer".
_NEAR = 1 / 3


def _growth(rows: Rows, name: str) -> float:
    """Mean over seeds at the last step over mean over seeds at the first step."""
    line = rows.average("step", name)
    return float(line.mean[-1] / line.mean[0])


def _evaluate_growth(results: Results) -> Outcome:
    paper = {"narrow": ("63x", "66x"), "wide": ("40x", "10x")}
    checks = []
    growths: dict[tuple[str, str], float] = {}
    for variant in variants(results):
        rows = results.rows.where(variant=variant)
        width = f"{rows['width'][0]:.0f}"
        for name, said in zip(("lower", "upper"), paper.get(variant, ("-", "-")), strict=True):
            growth = growths[variant, name] = _growth(rows, name)
            checks.append(
                Check(
                    f"width {width}: {name} bound grows at least tenfold from initialisation",
                    said,
                    f"{number(growth)}x",
                    growth >= 10,
                )
            )
    if {"narrow", "wide"} <= set(variants(results)):
        first, second = growths["narrow", "upper"], growths["wide", "upper"]
        checks.append(
            Check(
                "the upper bound grows less in the wider network",
                "66x, 10x",
                f"{number(first)}x, {number(second)}x",
                second < first,
            )
        )
    lower, upper = (growths[variants(results)[0], name] for name in ("lower", "upper"))
    return Outcome(tuple(checks), f"growth: lower {number(lower)}x, upper {number(upper)}x")


def _draw_growth(results: Results) -> Figure:
    with styled():
        names = variants(results)
        figure, axes = panels(len(names))
        for place, variant in zip(axes, names, strict=True):
            rows = results.rows.where(variant=variant)
            draw_bounds_over_time(place, rows)
            place.set_title(f"width {rows['width'][0]:.0f}")
        axes[0].set_ylabel(LIPSCHITZ)
        axes[0].legend()
    return figure


A1 = Finding(
    "A1",
    _A1,
    "Evolution of the bounds during training",
    "How far do both bounds move from their values at initialisation?",
    "section 3.1, figure 2",
    all_rows,
    _evaluate_growth,
    _draw_growth,
)


def _searched(
    sources: Sources,
    search: Callable[[nn.Module, Sweep], float],
    name: str,
    checkpoints: int = _EVOLUTION_CHECKPOINTS,
) -> Iterator[dict[str, Any]]:
    """Scores of some checkpoints of A1's narrow network, with what a search found there."""
    sweep = sources.sweep(_A1, "narrow")
    steps = {(run.width, run.seed): spread(list(run.steps), checkpoints) for run in sweep.runs}
    named = {(run.width, run.seed): run for run in sweep.runs}
    for row in sweep.scores():
        key = row["width"], row["seed"]
        if row["step"] in steps.get(key, ()):
            yield {**row, name: search(sweep.model(named[key], row["step"]), sweep)}


def _positions(rows: Rows, name: str) -> NDArray[np.float64]:
    trained = rows.keep(rows["step"] > 0)
    return relative_position(trained[name], trained["lower"], trained["upper"])


def _near_check(rows: Rows, name: str, words: str, paper: str) -> Check:
    positions = _positions(rows, name)
    return Check(
        f"{words} lies in the lower third between lower and upper bound (logarithmic), at every "
        "checkpoint after the first",
        paper,
        f"at most {np.nanmax(positions):.2f}, mean {np.nanmean(positions):.2f} "
        "(0: lower bound, 1: upper bound)",
        bool(np.nanmax(positions) < _NEAR),
    )


def _draw_one(results: Results, name: str, curve: Curve) -> Figure:
    with styled():
        figure, (axes,) = panels(1, width=5.6)
        draw_bounds_over_time(axes, results.rows, {"upper": UPPER, name: curve, "lower": LOWER})
        axes.set_ylabel(LIPSCHITZ)
        axes.legend()
    return figure


def _evaluate_convex(results: Results) -> Outcome:
    rows = results.rows
    last = rows.last()
    ratio = last["convex"].mean() / last["lower"].mean()
    gap = last["upper"].mean() / last["lower"].mean()
    checks = (
        _near_check(rows, "convex", "the bound on S*", "much closer to the lower bound"),
        Check(
            "the bound on S* is never below the lower bound",
            "by definition",
            f"smallest quotient {number(float((rows['convex'] / rows['lower']).min()))}",
            bool((rows["convex"] >= rows["lower"] * (1 - 1e-5)).all()),
        ),
    )
    return Outcome(
        checks,
        f"at the end: S* {number(ratio)}x, upper bound {number(gap)}x the lower bound",
    )


A2 = Finding(
    "A2",
    "A2-convex",
    "The lower bound on convex combinations of samples",
    "Is the Lipschitz constant between samples near the lower bound or near the upper bound?",
    "section 3.1, figure 2; appendix 2.6.8",
    lambda sources: _searched(
        sources,
        lambda model, sweep: effective_lower_bound(model, sweep.data.x_train, sweep.data.x_test),
        "convex",
    ),
    _evaluate_convex,
    lambda results: _draw_one(results, "convex", Curve("bound on S*", "#E69F00", "s")),
)


def _evaluate_pairs(results: Results) -> Outcome:
    rows = results.rows
    quotient = rows["pairs"] / rows["lower"]
    checks = (
        Check(
            "the pairwise estimate is worse (smaller) than the largest Jacobian norm at every "
            "checkpoint",
            "0.45 to 0.77 (appendix 2.1)",
            f"pairwise over Jacobian: {number(quotient.min())} to {number(quotient.max())}",
            bool((quotient < 1).all()),
        ),
    )
    return Outcome(checks, f"pairwise / Jacobian at the end: {number(_last_quotient(rows))}")


def _last_quotient(rows: Rows) -> float:
    last = rows.last()
    return float((last["pairs"] / last["lower"]).mean())


A4 = Finding(
    "A4",
    "A4-pairs",
    "Jacobian norms against difference quotients",
    "Is the largest Jacobian norm a better lower bound than difference quotients of samples?",
    "section 2; appendix 2.1",
    lambda sources: _searched(
        sources, lambda model, sweep: pairwise_lower_bound(model, sweep.data.x_train), "pairs"
    ),
    _evaluate_pairs,
    lambda results: _draw_one(
        results, "pairs", Curve("difference quotient of samples", "#D55E00", "o")
    ),
)


def _evaluate_ascent(results: Results) -> Outcome:
    rows = results.rows
    last = rows.last()
    gain = float((last["ascent"] / last["lower"]).mean())
    gap = float((last["upper"] / last["lower"]).mean())
    certified = bool((rows["certified"] <= rows["upper"]).all())
    checks = (
        _near_check(rows, "ascent", "the bound improved by ascent", "-"),
        Check(
            "certified lower bound <= certified upper bound at every checkpoint",
            "-",
            f"largest quotient {number(float((rows['certified'] / rows['upper']).max()))}",
            certified,
        ),
    )
    return Outcome(
        checks, f"at the end: ascent {number(gain)}x, upper bound {number(gap)}x the lower bound"
    )


X4 = Finding(
    "X4",
    "X4-ascent",
    "Beyond the paper: a better lower bound along training",
    "How much does gradient ascent on the Jacobian norm improve the lower bound?",
    "beyond the paper, which leaves better estimates open",
    lambda sources: _searched(
        sources,
        lambda model, sweep: ascended_lower_bound(model, sweep.data.x_train, steps=30, starts=4),
        "ascent",
        checkpoints=6,
    ),
    _evaluate_ascent,
    lambda results: _draw_one(results, "ascent", Curve("lower bound after ascent", "#E69F00", "s")),
)


_POWER_LAWS: dict[str, tuple[tuple[str, str | None], tuple[float, float, float]]] = {
    "FCN, cross-entropy": ((_A1, "narrow"), (0.59, 0.46, 0.44)),
    "FCN, squared error": (("A3-power-laws", "mse"), (0.80, 0.62, 0.52)),
    "CNN, cross-entropy": (("C3-width-cnn", None), (0.22, 0.29, 0.29)),
}


def _collect_power_laws(sources: Sources) -> Iterator[dict[str, Any]]:
    named = {study: name for name, ((study, _), _) in _POWER_LAWS.items()}
    for sweep in sources.available([place for place, _ in _POWER_LAWS.values()]):
        widest = max(run.width for run in sweep.runs)
        for row in sweep.scores():
            if row["width"] == widest:
                yield {**row, "setting": named[sweep.study]}


def _stable_from(rows: Rows, warmup_epochs: float) -> float:
    """The epoch from which on the fits run: a tenth of the training, after the warm-up."""
    return max(warmup_epochs, float(rows["epoch"].max()) / 10)


def _warmup_epochs(results: Results, label: str) -> float:
    settings = results.settings.get(label, {})
    steps, batch = settings.get("warmup_steps") or 0, settings.get("batch_size")
    size = settings.get("train_size") or 1
    batch = size if not isinstance(batch, int) else batch
    return float(steps) / -(-size // batch)


def _label(rows: Rows) -> str:
    """The label of the sweep that rows come from."""
    study, variant = rows["study"][0], rows["variant"][0]
    return f"{study}/{variant}" if variant else str(study)


def _fits(results: Results) -> dict[str, dict[str, PowerLaw]]:
    found: dict[str, dict[str, PowerLaw]] = {}
    for name in _POWER_LAWS:
        rows = results.rows.where(setting=name)
        if len(rows) == 0:
            continue
        start = _stable_from(rows, _warmup_epochs(results, _label(rows)))
        found[name] = {}
        for quantity in ("upper", "lower", "mean"):
            line = rows.average("epoch", quantity)
            found[name][quantity] = fit_power_law(line.x, line.mean, window=(start, np.inf))
    return found


def _evaluate_power_laws(results: Results) -> Outcome:
    fits = _fits(results)
    checks, table = [], [("setting", "bound", "slope", "paper", "R^2", "epochs")]
    for name, by_quantity in fits.items():
        published = dict(zip(("upper", "lower", "mean"), _POWER_LAWS[name][1], strict=True))
        for quantity, fit in by_quantity.items():
            window = f"{number(fit.window[0])} to {number(fit.window[1])}"
            table.append(
                (
                    name,
                    quantity,
                    f"{fit.slope:.2f}",
                    f"{published[quantity]:.2f}",
                    f"{fit.r_squared:.3f}",
                    window,
                )
            )
        worst = min(fit.r_squared for fit in by_quantity.values())
        slopes = [fit.slope for fit in by_quantity.values()]
        checks.append(
            Check(
                f"{name}: upper, lower and mean grow as powers of the epoch (R^2 >= 0.9, slopes "
                "above 0 and below 1)",
                "slopes " + ", ".join(f"{value:.2f}" for value in published.values()),
                f"slopes {', '.join(f'{slope:.2f}' for slope in slopes)}, smallest R^2 {worst:.3f}",
                worst >= 0.9 and all(0 < slope < 1 for slope in slopes),
            )
        )
    lower = {name: found["lower"].slope for name, found in fits.items()}
    names = list(_POWER_LAWS)
    if names[0] in lower and names[1] in lower:
        checks.append(
            Check(
                "the lower bound grows faster with squared error than with cross-entropy",
                "0.62 > 0.46",
                f"{lower[names[1]]:.2f}, {lower[names[0]]:.2f}",
                lower[names[1]] > lower[names[0]],
            )
        )
    first = next(iter(lower.items()))
    return Outcome(
        tuple(checks),
        f"slope of the lower bound ({first[0]}): {first[1]:.2f}",
        tuple(f"{name}: not run." for name in _POWER_LAWS if name not in fits),
        tuple(table),
    )


def _draw_fit(axes: Axes, rows: Rows, fits: dict[str, PowerLaw]) -> None:
    draw_bounds_over_time(axes, rows, BOUNDS)
    for fit in fits.values():
        x = np.array(fit.window)
        axes.plot(x, fit.at(x), color="0.2", linewidth=1, linestyle=(0, (4, 2)), zorder=5)


def _draw_power_laws(results: Results) -> Figure:
    with styled():
        fits = _fits(results)
        figure, axes = panels(len(fits), width=3.6 * len(fits))
        for place, (name, found) in zip(axes, fits.items(), strict=True):
            _draw_fit(place, results.rows.where(setting=name), found)
            place.set_title(name)
        axes[0].set_ylabel(LIPSCHITZ)
        axes[0].legend()
    return figure


A3 = Finding(
    "A3",
    "A3-power-laws",
    "Power laws in the epochs",
    "Do the bounds grow as powers of the training time once training is stable?",
    "appendix 3.8, table 8",
    _collect_power_laws,
    _evaluate_power_laws,
    _draw_power_laws,
)
