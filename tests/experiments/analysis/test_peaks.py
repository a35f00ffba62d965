from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.peaks import peak_alignment
from lipfast.errors import ArgumentError

WIDTHS = [4, 8, 16, 32, 64]


def _curve(peak: int, height: float = 3.0) -> list[float]:
    return [height / (1 + abs(np.log2(width / peak))) for width in WIDTHS]


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
