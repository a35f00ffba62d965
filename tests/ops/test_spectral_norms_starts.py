"""Estimates without a certificate are the first singular value, whatever they start from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lipfast


def planted(side: int, gap: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A matrix with first values 1 and 1 - gap above 0.3, and its right singular vectors."""
    left, right = (
        torch.linalg.qr(torch.randn(side, side, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    values = torch.full((side,), 0.3, dtype=torch.float64)
    values[0], values[1] = 1.0, 1 - gap
    return left @ torch.diag(values) @ right.T, right


@pytest.mark.parametrize("certify", [True, False])
@pytest.mark.parametrize("rtol", [1e-6, 1e-3])
@pytest.mark.parametrize("side", [8, 60, 150])
def test_starts_at_another_singular_vector(
    side: int, rtol: float, certify: bool, capability: str
) -> None:
    generator = torch.Generator().manual_seed(side)
    for gap in (0.3, 0.05, 0.01):
        matrix, right = planted(side, gap, generator)
        for index in (1, 2, side - 1):
            start = [right[:, index].contiguous()]
            norms = lipfast.spectral_norms([matrix], start=start, rtol=rtol, certify=certify)
            assert 1 - rtol <= float(norms.lower[0]) <= 1 + 1e-12
