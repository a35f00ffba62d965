from __future__ import annotations

import math

import pytest
import torch

from lipfast.reference import jacobian_reduction as reduction
from lipfast.reference import spectral_norms as reference


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (8, 3), (40, 40)])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_bracket_holds_the_singular_value(shape: tuple[int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    truth = float(torch.linalg.svdvals(matrix)[0]) * scale
    lower, upper = reference.spectral_norm_bracket(matrix * scale)
    assert lower <= truth * (1 + 1e-14) and upper >= truth * (1 - 1e-14)
    assert upper - lower <= 1e-6 * upper


def test_a_shift_below_the_truth_proves_nothing() -> None:
    matrix = torch.diag(torch.tensor([0.5, 0.9], dtype=torch.float64))
    assert reference.upper_bound(matrix, 0.8) == math.inf
    assert 0.9 <= reference.upper_bound(matrix, 0.8101) < 0.91


def test_lower_bound_of_any_vector_is_below() -> None:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    truth = float(torch.linalg.svdvals(matrix)[0])
    for _ in range(20):
        vector = torch.randn(9, generator=generator, dtype=torch.float64)
        assert 0 < reference.lower_bound(matrix, vector) <= truth


def test_zero_matrix() -> None:
    assert reference.spectral_norm_bracket(torch.zeros(2, 3)) == (0.0, 0.0)
    spectral, frobenius = reduction.jacobian_reduction(torch.zeros(4, 2, 3))
    assert spectral.tolist() == frobenius.tolist() == [0.0] * 4
