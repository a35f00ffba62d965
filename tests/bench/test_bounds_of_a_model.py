"""docs/bounds-of-a-model.md is what its script writes, digits aside."""

from __future__ import annotations

import re

from bench.bounds_of_a_model import PAGE, page


def words(text: str) -> list[str]:
    """Digits differ between processors in the last places, and so do widths."""
    return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?%?|-{5,}", "#", text).split()


def test_the_page_is_generated() -> None:
    assert words(PAGE.read_text()) == words(page())
