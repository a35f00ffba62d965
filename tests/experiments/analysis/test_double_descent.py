from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.double_descent import find_inner_peak, find_peak
from lipfast.errors import ArgumentError

CURVE = [1.0, 1.5, 3.0, 1.5, 1.0]


def test_a_peak_inside_is_visible_and_one_at_the_end_is_not() -> None:
    peak = find_peak(CURVE)
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
    inside = find_inner_peak(CURVE)
    assert inside == find_peak(CURVE)
