from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.double_descent import find_inner_peak, find_peak
from experiments.analysis.peaks import peak_alignment
from experiments.analysis.position import relative_position
from experiments.analysis.rank import rank_correlation
from lipfast.errors import ArgumentError

WIDTHS = [4, 8, 16, 32, 64]


def _curve(peak: int, height: float = 3.0) -> list[float]:
    return [height / (1 + abs(np.log2(width / peak))) for width in WIDTHS]


def test_a_peak_inside_is_visible_and_one_at_the_end_is_not() -> None:
    peak = find_peak(_curve(16))
    assert peak.index == 2
    assert peak.rise == pytest.approx(3)
    assert peak.visible() and peak.visible(2.9) and not peak.visible(3.1)
    assert not find_peak([1.0, 2.0, 3.0]).visible()
    assert not find_peak([3.0, 2.0, 1.0]).visible()
    assert find_peak([1.0, np.nan, 4.0, 2.0]).index == 2
    with pytest.raises(ArgumentError):
        find_peak([np.nan, 0.0])


def test_the_inner_peak_is_the_local_maximum_that_stands_out_most() -> None:
    peak = find_inner_peak([9.0, 2.0, 3.0, 1.0, 5.0, 2.5])
    assert peak is not None
    assert (peak.index, peak.rise, peak.fall) == (4, 5.0, 2.0)
    assert find_inner_peak([9.0, 5.0, 2.0, 1.0]) is None
    assert find_inner_peak([1.0, 5.0, 5.0, 1.0]) is None
    assert find_inner_peak([1.0]) is None
    skipped = find_inner_peak([9.0, 1.0, np.nan, 4.0, 2.0])
    assert skipped is not None
    assert skipped.index == 3
    inside = find_inner_peak(_curve(16))
    assert inside == find_peak(_curve(16))


def test_seeds_that_agree_have_an_interval_without_width() -> None:
    alignment = peak_alignment(WIDTHS, [_curve(16)] * 4, [_curve(32)] * 4)
    assert (alignment.reference, alignment.width) == (16, 32)
    assert (alignment.octaves, alignment.low, alignment.high) == (1, 1, 1)
    assert alignment.aligned and alignment.seeds == 4
    assert not peak_alignment(WIDTHS, [_curve(4)], [_curve(64)]).aligned


def test_the_interval_is_that_of_all_resamples() -> None:
    # Two seeds of three resample to peaks at 16, the third, higher one, at 64: the mean peaks at 64
    # whenever it is drawn (19 of 27 resamples), else at 16 (8 of 27).
    curve = [_curve(16), _curve(16), _curve(64, height=30)]
    alignment = peak_alignment(WIDTHS, [_curve(16)] * 3, curve)
    assert (alignment.width, alignment.low, alignment.high) == (64, 0, 2)
    narrow = peak_alignment(WIDTHS, [_curve(16)] * 3, curve, confidence=0.3)
    assert (narrow.low, narrow.high) == (2, 2)  # quantiles .35 and .65, above 8/27


def test_many_seeds_are_drawn_reproducibly() -> None:
    generator = np.random.default_rng(3)
    loss = np.array([_curve(16) for _ in range(8)]) + generator.normal(0, 0.3, (8, 5))
    first = peak_alignment(WIDTHS, loss, loss[:, ::-1])
    assert first == peak_alignment(WIDTHS, loss, loss[:, ::-1])
    assert first != peak_alignment(WIDTHS, loss[:5], loss[:5, ::-1])
    assert first.low <= first.octaves <= first.high


def test_missing_runs_are_skipped_and_missing_widths_refused() -> None:
    curve = np.array([_curve(16), _curve(16)])
    curve[0, 2] = np.nan
    assert peak_alignment(WIDTHS, curve, [_curve(16)] * 2).reference == 16
    curve[1, 2] = np.nan
    with pytest.raises(ArgumentError, match="no run with a value"):
        peak_alignment(WIDTHS, curve, curve)
    with pytest.raises(ArgumentError, match="must be"):
        peak_alignment(WIDTHS, [_curve(4)], [_curve(4)] * 2)


def test_position_between_bounds() -> None:
    position = relative_position([1.0, 10.0, 100.0], 1.0, 100.0)
    np.testing.assert_allclose(position, [0, 0.5, 1])
    assert np.isnan(relative_position(2.0, 2.0, 2.0))


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ArgumentError):
        rank_correlation([1], [1])
