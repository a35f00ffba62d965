"""E: label noise against width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from experiments.analysis.double_descent import find_peak
from experiments.analysis.rank import rank_correlation
from experiments.findings.common import last_rows, panels, styled
from experiments.findings.finding import Check, Finding, Outcome
from experiments.findings.sources import Sources
from experiments.results import Results, Rows

_C3 = "C3-width-cnn"


def _collect_label_noise(sources: Sources) -> Iterator[dict[str, Any]]:
    own = sources.sweeps()
    noises = {variant: float(sweep.settings["label_noise"]) for variant, sweep in own.items()}
    for row in last_rows(sources):
        yield {**row, "noise": noises[row["variant"]]}
    shared = sources.sweep(_C3)
    noise = float(shared.settings["label_noise"])
    if noise not in noises.values():
        for row in shared.last_scores():
            yield {**row, "noise": noise}


def grid(rows: Rows, name: str) -> tuple[list[float], list[float], NDArray[np.float64]]:
    """Noise levels, widths that all of them have, and means over seeds (noises, widths)."""
    noises = rows.values("noise")
    common = set.intersection(*(set(rows.where(noise=n).values("width")) for n in noises))
    widths = sorted(common)
    values = np.array(
        [[np.nanmean(rows.where(noise=n, width=w)[name]) for w in widths] for n in noises]
    )
    return noises, widths, values


def _evaluate_label_noise(results: Results) -> Outcome:
    noises, widths, lower = grid(results.rows, "lower")
    _, _, loss = grid(results.rows, "test_loss")
    rows = [find_peak(row) for row in lower]
    columns = [find_peak(column) for column in lower.T]
    over_width = sum(peak.visible() for peak in rows)
    over_noise = sum(peak.visible() for peak in columns)
    peaks = [float(widths[peak.index]) for peak in rows]
    shift = rank_correlation(noises, peaks) if len(set(peaks)) > 1 else 0.0
    loss_rows = sum(find_peak(row).visible() for row in loss)
    checks = (
        Check(
            "the lower bound is non-monotone in the width (peak inside, 1.1x above both sides) at "
            "every noise level",
            "every noise level",
            f"at {over_width} of {len(noises)} levels",
            over_width == len(noises),
        ),
        Check(
            "the lower bound is non-monotone in the noise (the same criterion) at most widths",
            "rises, then falls beyond a memorisation threshold",
            f"at {over_noise} of {len(widths)} widths",
            over_noise > len(widths) / 2,
        ),
        Check(
            "the test loss is non-monotone in the width at most noise levels",
            "double descent",
            f"at {loss_rows} of {len(noises)} levels",
            loss_rows > len(noises) / 2,
        ),
        Check(
            "the width at which the lower bound peaks grows with the noise (rank correlation > 0)",
            "the threshold moves to more parameters",
            "peaks at widths "
            + ", ".join(f"{width:g}" for width in peaks)
            + f" for {', '.join(f'{noise:.0%}' for noise in noises)} noise; "
            + f"rank correlation {shift:.2f}",
            shift > 0,
        ),
    )
    return Outcome(
        checks,
        f"non-monotone in width at {over_width} of {len(noises)} noise levels, in noise at "
        f"{over_noise} of {len(widths)} widths",
    )


def _draw_label_noise(results: Results) -> Figure:
    titles = {"lower": "lower bound", "test_loss": "test loss"}
    with styled():
        figure, axes = panels(2, height=3.8)
        for place, (name, title) in zip(axes, titles.items(), strict=True):
            noises, widths, values = grid(results.rows, name)
            shown = place.imshow(
                values, origin="lower", aspect="auto", cmap="cividis", norm=LogNorm()
            )
            bar = figure.colorbar(shown, ax=place, label=title)
            bar.ax.minorticks_off()
            tops = values.argmax(axis=1)
            place.plot(tops, range(len(noises)), "o", color="white", markersize=5)
            place.set_xticks(range(len(widths)), [f"{width:g}" for width in widths])
            place.set_yticks(range(len(noises)), [f"{noise:.0%}" for noise in noises])
            place.set_xlabel("width (channels of the first layer)")
            place.set_ylabel("labels with noise")
            place.set_title(f"{title}; dots: largest of the row")
            place.grid(visible=False)
    return figure


E = Finding(
    "E",
    "E-label-noise",
    "Label noise against width",
    "Does the lower bound rise and fall again with noise as it does with width?",
    "section 5, figure 8; appendix 2.6.16",
    _collect_label_noise,
    _evaluate_label_noise,
    _draw_label_noise,
)
