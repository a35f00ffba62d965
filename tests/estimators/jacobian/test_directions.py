"""The input direction that a Jacobian stretches most attains its norm."""

from __future__ import annotations

import math

import pytest
import torch

from lipfast.estimators.jacobian.directions import steepest_direction


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (1, 1)])
def test_steepest_direction_attains_the_operator_norm(shape: tuple[int, int], norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, *shape, dtype=torch.float64, generator=generator)
    direction = steepest_direction(matrices, norm)
    image = (matrices @ direction[:, :, None])[:, :, 0]
    ratio = torch.linalg.vector_norm(image, norm, 1) / torch.linalg.vector_norm(direction, norm, 1)
    torch.testing.assert_close(ratio, torch.linalg.matrix_norm(matrices, norm))


def test_some_direction_where_the_jacobian_is_zero_or_not_finite() -> None:
    matrices = torch.stack([torch.zeros(2, 3), torch.full((2, 3), math.nan)]).double()
    assert torch.equal(steepest_direction(matrices, 2), torch.eye(3).double()[[0, 0]])
