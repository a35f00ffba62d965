from __future__ import annotations

import numpy as np
import pytest

from experiments.analysis.rank import rank_correlation
from lipfast.errors import ArgumentError


def test_rank_correlation_with_ties() -> None:
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ArgumentError):
        rank_correlation([1], [1])
