from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import pyarrow as pa
import pyarrow.compute as pc

from experiments.analysis import summarise
from experiments.config import SweepConfig
from experiments.figures import double_descent_figure, draw_sweep

MakeConfig = Callable[..., SweepConfig]


def test_figures_are_written(tmp_path: Path, scores: pa.Table, make_config: MakeConfig) -> None:
    settings = dict(matplotlib.rcParams)
    paths = draw_sweep(scores, make_config(), tmp_path)
    assert [path.name for path in paths] == [
        "test.png",
        "test.pdf",
        "test-training.png",
        "test-training.pdf",
    ]
    for path in paths:
        start = b"\x89PNG" if path.suffix == ".png" else b"%PDF"
        assert path.read_bytes().startswith(start)
    assert dict(matplotlib.rcParams) == settings


def test_the_figure_shows_curves_peaks_and_threshold(
    scores: pa.Table, make_config: MakeConfig
) -> None:
    figure = double_descent_figure(summarise(scores), make_config())
    test, bounds, train = figure.axes
    assert [axes.get_ylabel() for axes in (test, train)] == ["test loss", "training loss"]
    assert len(bounds.get_legend().get_texts()) == 3
    for axes, peaks in ((test, [16]), (train, []), (bounds, [8, 8])):
        assert axes.lines[0].get_xdata().tolist() == [4, 8, 16, 32, 64]
        assert any(list(line.get_xdata()) == [32, 32] for line in axes.lines)
        rings = [line for line in axes.lines if len(line.get_xdata()) == 1]
        assert [line.get_xdata()[0] for line in rings] == peaks
        # Readable in grey: markers differ within a panel.
        markers = [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 5]
        assert len(set(markers)) == len(markers)


def test_one_seed_and_one_width_can_be_drawn(
    tmp_path: Path, scores: pa.Table, make_config: MakeConfig
) -> None:
    one = scores.filter(
        pc.and_(pc.equal(scores["meta.width"], 8), pc.equal(scores["meta.seed"], 0))
    )
    assert all(path.stat().st_size > 1000 for path in draw_sweep(one, make_config(), tmp_path))
