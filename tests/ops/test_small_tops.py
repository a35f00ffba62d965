"""Largest eigenvalues from powers, against those of a library."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lipfast.ops.small_tops import top_of_small


def with_eigenvalues(values: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(len(values), len(values), generator=generator, dtype=dtype)
    basis = torch.linalg.qr(square)[0]
    return basis @ torch.diag(values.to(dtype)) @ basis.mH


@pytest.mark.parametrize("squarings", [12, 24, 48])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e70])
def test_values_are_as_near_as_the_power_says(
    squarings: int, dtype: torch.dtype, scale: float
) -> None:
    spectra = [
        torch.linspace(0, 1, 40),
        torch.linspace(0.999, 1, 40),
        1 - 1e-6 * torch.arange(40).double(),
        torch.ones(40),
        10.0 ** -torch.arange(40),
    ]
    matrices = torch.stack([with_eigenvalues(scale * own.double(), dtype) for own in spectra])
    values, vectors = top_of_small(matrices, squarings)
    assert bool((values <= scale * (1 + 1e-13)).all())
    assert bool((values >= scale * (1 - max(2.0**-squarings * 8, 1e-13))).all())
    torch.testing.assert_close(vectors.norm(dim=1).double(), torch.ones(5).double())
    images = torch.bmm(matrices, vectors[:, :, None])[:, :, 0]
    # Of what a power does not tell apart any mixture will do.
    residuals = (images - values[:, None] * vectors).norm(dim=1) / scale
    assert bool((residuals <= max(40 * 2.0**-squarings, 1e-12)).all())


def test_zero_and_nan() -> None:
    matrices = torch.zeros(2, 3, 3).double()
    matrices[1, 0, 2] = math.nan
    values, vectors = top_of_small(matrices)
    assert values[0] == 0 and bool((vectors[0] == 0).all())
    assert bool(values[1].isnan())
