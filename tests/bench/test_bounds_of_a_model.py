"""docs/bounds-of-a-model.md is what its script writes, but for the processor's rounding."""

from __future__ import annotations

import re

from bench.bounds_of_a_model import PAGE, page


def words(text: str) -> list[str]:
    """Words of a page, digits aside.

    Digits differ between processors in the last places, and so do widths. A factor that is one but
    for a rounding of its logarithm has a row on some processors only.
    """
    text = re.sub(r"^\W*[├└]─ .* 1 +[\d.e+]+\n", "", text, flags=re.MULTILINE)
    return re.sub(r"-?\d[\d.]*(e[+-]?\d+)?%?|-{5,}", "#", text).split()


def test_the_page_is_generated() -> None:
    assert words(PAGE.read_text()) == words(page())


def test_only_rows_of_factors_of_one_are_left_out() -> None:
    row = "├─ avgpool (adaptive_avg_pool2d)      {}   1.361e+04\n"
    assert words("a\n" + row.format("1")) == words("a\n")
    assert words("a\n" + row.format("1.1")) != words("a\n")
    assert "".join(words(PAGE.read_text())).count("─") == PAGE.read_text().count("─")
