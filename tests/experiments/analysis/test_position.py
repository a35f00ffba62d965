from __future__ import annotations

import numpy as np

from experiments.analysis.position import relative_position


def test_position_between_bounds() -> None:
    position = relative_position([1.0, 10.0, 100.0], 1.0, 100.0)
    np.testing.assert_allclose(position, [0, 0.5, 1])
    assert np.isnan(relative_position(2.0, 2.0, 2.0))
