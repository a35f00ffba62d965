"""docs/upper-bounds.md: its code runs and prints what it says, and what it points to is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "upper-bounds.md").read_text()


def _anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_code_runs_and_comments_are_results() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)  # the page's own text
    said = re.findall(r"^([\w.]+)  # (\".*\")$", block, re.MULTILINE)
    assert len(said) == 2
    for expression, result in said:
        assert eval(expression, names) == eval(result)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", PAGE)
    assert len(links) > 4
    for file, anchor in links:
        assert (DOCS / file).is_file()
        assert not anchor or anchor in _anchors(DOCS / file)
    for bench in re.findall(r"`(bench/\w+\.py)`", PAGE):
        assert (DOCS.parent / bench).is_file()
