from __future__ import annotations

import math

import pytest
from matplotlib.figure import Figure

from experiments.bracket_figures import bracket_figure, draw_brackets
from experiments.brackets import Bracket

BRACKETS = [
    Bracket(width, seed, 8.0 * s, 4.0 * s, 3.0 * s, 2.0 * s, 3.5 * s if width < 17 else math.nan)
    for width, s in ((4, 1.0), (8, 5.0), (64, 2.0))
    for seed in (0, 1)
]


def test_every_bound_is_a_curve_of_its_own_colour_and_marker() -> None:
    axes = Figure().subplots()
    draw_brackets(axes, BRACKETS)
    curves = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert len({line.get_color() for line in curves}) == len(curves) == 5
    assert len({line.get_marker() for line in curves}) == 5
    assert curves[0].get_ydata().tolist() == [8, 40, 16]
    truth = next(line for line in curves if line.get_marker() == "*")
    assert truth.get_ydata()[:2].tolist() == [3.5, 17.5]
    assert math.isnan(truth.get_ydata()[2])
    (ring,) = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert ring.get_xdata()[0] == 8


def test_ratios_are_drawn_beside_the_values() -> None:
    left, right = bracket_figure(BRACKETS).axes
    assert len(left.get_legend().get_texts()) == 5
    values = {line.get_label(): line.get_ydata().tolist() for line in right.lines}
    assert values["upper: product of norms"] == pytest.approx([8 / 3] * 3)
    assert values["upper: quadratic constraints"] == pytest.approx([4 / 3] * 3)
    assert values["lower: found by a search"] == [1, 1, 1]
    assert left.get_yscale() == right.get_yscale() == "log"


def test_networks_too_wide_to_enumerate_have_no_entry_for_the_truth() -> None:
    wide = [bracket for bracket in BRACKETS if bracket.width > 16]
    left, _ = bracket_figure(wide).axes
    assert not any("enumerated" in text.get_text() for text in left.get_legend().get_texts())
