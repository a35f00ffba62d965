from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.histogram import norm_histogram
from lipfast.errors import ArgumentError


def test_counts_of_a_known_distribution() -> None:
    norms = np.repeat([1.5, 3.0, 6.0, 12.0], [1, 2, 3, 4])
    histogram = norm_histogram(norms, bins=4, limits=(1, 16))
    assert histogram.edges.tolist() == pytest.approx([1, 2, 4, 8, 16])
    assert histogram.counts.tolist() == [1, 2, 3, 4]
    assert (histogram.median, histogram.largest, histogram.tail) == (6, 12, 2)


def test_no_sample_is_lost() -> None:
    norms = [0.0, 0.5, 1.0, 16.0, 99.0]
    assert norm_histogram(norms, bins=4, limits=(1, 16)).counts.tolist() == [3, 0, 0, 2]
    assert norm_histogram([2.0, 2.0]).counts.sum() == 2
    zeros = norm_histogram([0.0])
    assert zeros.counts.sum() == 1
    assert zeros.tail == np.inf


@pytest.mark.parametrize("norms", [[], [-1.0], [np.nan]])
def test_what_is_no_norm_is_refused(norms: list[float]) -> None:
    with pytest.raises(ArgumentError):
        norm_histogram(norms)
    with pytest.raises(ArgumentError, match="limits"):
        norm_histogram([1.0], limits=(2, 1))
