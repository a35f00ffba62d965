from __future__ import annotations

from typing import Any

import pytest
import torch

from lipfast.errors import ArgumentError
from lipfast.ops.symbol_grams import Frequencies, symbol_grams
from lipfast.ops.tap_products import tap_products
from lipfast.reference.symbol_grams import symbol_grams as reference
from tests.ops.test_tap_products import taps_of


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 1, 1), (3, 2, 1), (2, 3, 2)], ids=str)
def test_matches_the_reference(axes: tuple[int, int, int]) -> None:
    taps = taps_of(3, axes, 3, 5)
    symbols, shifts = torch.tensor([2, 0, 2]), torch.tensor([0.0, 7.0, -1.0], dtype=torch.float64)
    periods = [7 if size > 1 else 1 for size in axes]
    centres = torch.tensor([[0, 0, 0], [1, 2, 3], [6, 5, 4]]) % torch.tensor(periods)
    at = Frequencies(symbols, centres, periods)
    found = symbol_grams(tap_products(taps, axes), axes, at, shifts)
    expected = reference(taps, axes, at, shifts)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(found, found.mH)


def test_fine_frequencies_do_not_lose_digits() -> None:
    """A shift of the frequency by a whole cycle changes nothing, not in one bit."""
    axes, cycle = (3, 1, 1), 2**40
    products = tap_products(taps_of(1, axes, 2, 2), axes)
    zero, shifts = torch.tensor([0]), torch.tensor([1.0], dtype=torch.float64)
    found = [
        symbol_grams(
            products, axes, Frequencies(zero, torch.tensor([[at, 0, 0]]), (cycle, 1, 1)), shifts
        )
        for at in (12345, 12345 - cycle)
    ]
    assert torch.equal(*found)


def test_opcheck() -> None:
    products = tap_products(taps_of(2, (2, 2, 1), 2, 3), (2, 2, 1))
    centres, shifts = torch.tensor([[1, 0, 0]]), torch.tensor([1.0], dtype=torch.float64)
    given = (products, [2, 2, 1], torch.tensor([1]), centres, [3, 3, 1], shifts)
    torch.library.opcheck(torch.ops.lipfast.symbol_grams.default, given)


def test_bad_input() -> None:
    at = Frequencies(torch.tensor([1]), torch.tensor([[1, 0, 0]]), (3, 3, 1))
    good: dict[str, Any] = {
        "products": tap_products(taps_of(2, (2, 2, 1), 2, 3), (2, 2, 1)),
        "axes": (2, 2, 1),
        "at": at,
        "shifts": torch.tensor([1.0], dtype=torch.float64),
    }
    bad = [
        ("products", good["products"].float(), "products: expected float64"),
        ("products", good["products"][:, 1:], "products: expected"),
        ("axes", (2, 2), "products: expected"),
        ("at", at._replace(symbols=torch.tensor([1.0])), "symbols: expected int64"),
        ("at", at._replace(centres=torch.tensor([[1, 0]])), r"int64 of shape \(1, 3\)"),
        ("at", at._replace(periods=(0, 1, 1)), "periods: expected three numbers"),
        ("shifts", torch.tensor([1.0]), "shifts: expected float64"),
    ]
    for name, value, message in bad:
        with pytest.raises(ArgumentError, match=message):
            symbol_grams(**{**good, name: value})
