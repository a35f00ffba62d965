from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.tap_products import tap_products
from lipfast.reference.tap_products import tap_products as reference


def taps_of(symbols: int, axes: tuple[int, int, int], n: int, m: int) -> Tensor:
    generator = torch.Generator().manual_seed(n + m)
    count = axes[0] * axes[1] * axes[2]
    return torch.randn(symbols, count, n, m, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 1, 1), (3, 2, 1), (2, 3, 2)], ids=str)
def test_matches_the_reference(axes: tuple[int, int, int]) -> None:
    taps = taps_of(2, axes, 3, 5)
    torch.testing.assert_close(tap_products(taps, axes), reference(taps, axes))


def test_opcheck() -> None:
    given = (taps_of(1, (2, 2, 1), 2, 3), [2, 2, 1])
    torch.library.opcheck(torch.ops.lipfast.tap_products.default, given)


def test_bad_input() -> None:
    taps = taps_of(1, (2, 2, 1), 2, 3)
    bad = [
        (taps.float(), (2, 2, 1), "taps: expected float64"),
        (taps[0], (2, 2, 1), "taps: expected 4 dimensions"),
        (taps, (2, 2), "expected three sizes with a product of 4"),
        (taps, (3, 2, 1), "expected three sizes with a product of 4"),
        (taps, (-2, -2, 1), "expected three sizes with a product of 4"),
        (taps[:, :, :0], (2, 2, 1), "empty"),
        (taps[..., :1].expand(1, 4, 2, 2**28), (2, 2, 1), r"taps: sums of .* fewer than 2\^30"),
    ]
    for tensor, axes, message in bad:
        with pytest.raises(ArgumentError, match=message):
            tap_products(tensor, axes)
