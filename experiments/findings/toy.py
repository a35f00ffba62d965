"""A5: a network of two inputs, where the Lipschitz constant can be found on a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.analysis.position import relative_position
from experiments.analysis.searches import grid_norms, grid_points
from experiments.drawing import LOWER, SERIES, UPPER, Curve
from experiments.findings.common import LIPSCHITZ, draw_bounds_over_time, number, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources, spread
from experiments.results import Results

_HALF = 5.0
_PER_AXIS = 1000
_WHILE_TRAINING = 250
_MAP = 100
_TOY_CHECKPOINTS = 16


def _collect_toy(sources: Sources) -> Iterator[dict[str, Any]]:
    sweep = sources.sweep()
    scores = {(row["width"], row["seed"], row["step"]): row for row in sweep.scores()}
    for run in sweep.runs:
        for step in spread(list(run.steps), _TOY_CHECKPOINTS):
            last = step == run.steps[-1]
            model = sweep.model(run, step)
            norms = grid_norms(model, -_HALF, _HALF, _PER_AXIS if last else _WHILE_TRAINING)
            row = scores[run.width, run.seed, step]
            yield {**row, "kind": "bounds", "grid": float(norms.max())}
    run = sweep.runs[0]
    model = sweep.model(run)
    norms = grid_norms(model, -_HALF, _HALF, _MAP)
    with torch.no_grad():
        classes = model(grid_points(-_HALF, _HALF, _MAP)).argmax(dim=1)
    for place, (norm, label) in enumerate(
        zip(norms.flatten().tolist(), classes.tolist(), strict=True)
    ):
        yield {"kind": "map", "place": place, "norm": norm, "label": label}
    for point, label in zip(sweep.data.x_train.tolist(), sweep.data.y_train.tolist(), strict=True):
        yield {"kind": "sample", "x": point[0], "y": point[1], "label": label}


def _evaluate_toy(results: Results) -> Outcome:
    last = results.rows.where(kind="bounds").last()
    positions = relative_position(last["grid"], last["lower"], last["upper"])
    lower, grid, upper = (float(last[name].mean()) for name in ("lower", "grid", "upper"))
    checks = (
        Check(
            "the maximum over a dense grid lies in the lower third between lower and upper bound "
            "(logarithmic)",
            "135.8, 144.2, 389.1: position 0.06",
            f"{number(lower)}, {number(grid)}, {number(upper)}: position {positions.mean():.2f}",
            bool((positions < 1 / 3).all()),
        ),
        Check(
            "lower bound <= grid <= upper bound up to the grid's spacing (2 %)",
            "by definition",
            f"grid / lower {number(float((last['grid'] / last['lower']).min()))}, "
            f"grid / upper {number(float((last['grid'] / last['upper']).max()))}",
            bool(
                (last["grid"] >= 0.98 * last["lower"]).all()
                and (last["grid"] <= last["upper"]).all()
            ),
        ),
    )
    return Outcome(checks, f"grid / lower bound: {number(grid / lower)}")


def _draw_toy(results: Results) -> Figure:
    rows = results.rows
    cells = rows.where(kind="map")
    samples = rows.where(kind="sample")
    with styled():
        figure, (training, plane) = panels(2)
        draw_bounds_over_time(
            training,
            rows.where(kind="bounds"),
            {"upper": UPPER, "grid": Curve("dense grid", "#E69F00", "s"), "lower": LOWER},
            by="step",
        )
        training.set_ylabel(LIPSCHITZ)
        training.legend()
        image = cells["norm"].reshape(_MAP, _MAP).T
        shown = plane.imshow(
            image, origin="lower", extent=(-_HALF, _HALF, -_HALF, _HALF), cmap="cividis"
        )
        figure.colorbar(shown, ax=plane, label="Jacobian norm")
        axis = np.linspace(-_HALF, _HALF, _MAP)
        plane.contour(
            axis,
            axis,
            cells["label"].reshape(_MAP, _MAP).T,
            levels=[0.5, 1.5],
            colors="white",
            linewidths=1,
        )
        for label, (_, marker) in zip(samples.values("label"), SERIES, strict=False):
            chosen = samples.where(label=label)
            plane.plot(chosen["x"], chosen["y"], marker, color="white", markersize=1.8)
        plane.grid(visible=False)
        plane.set_xlabel("first input")
        plane.set_ylabel("second input")
    return figure


A5 = Finding(
    "A5",
    "A5-toy",
    "A network of two inputs",
    "How near is the lower bound to the Lipschitz constant where that can be found on a grid?",
    "section 3.3, figure 4; appendix 2.6.1",
    _collect_toy,
    _evaluate_toy,
    _draw_toy,
)
