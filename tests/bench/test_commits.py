"""bench.commits: what the table of two trees says."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import commits


def test_ratios_are_of_medians_and_to_the_first_tree(monkeypatch):
    calls = []

    def score(tree: Path, archive: Path) -> list[tuple[int, float, float]]:
        calls.append(tree.name)
        factor = {"here": 1.0, "there": 3.0}[tree.name]
        return [(7, factor * wall, 2 * factor * wall) for wall in (1.0, 2.0, 90.0)]

    monkeypatch.setattr(commits, "score", score)
    table = commits.compare([Path("here"), Path("there")], Path("archive"), turns=2)
    assert calls == ["here", "there", "here", "there"]
    assert [list(column.cells) for column in table.columns] == [
        ["here", "there"],
        ["2.000", "6.000"],
        ["1.00", "3.00"],
        ["4.000", "12.000"],
        ["1.00", "3.00"],
    ]
    assert table.caption == "7 checkpoints, medians of 6 calls"


def test_trees_that_score_different_numbers_are_not_compared(monkeypatch):
    counts = iter((7, 6))
    monkeypatch.setattr(commits, "score", lambda *_: [(next(counts), 1.0, 1.0)])
    with pytest.raises(RuntimeError, match=r"\[6, 7\]"):
        commits.compare([Path("a"), Path("b")], Path("archive"), turns=1)


@pytest.mark.parametrize("kind", list(commits.ARCHIVES))
def test_archives_hold_checkpoints_and_samples(kind, tmp_path):
    options = {"per_width": 1} if kind == "demo" else {"checkpoints": 2}
    commits.ARCHIVES[kind](tmp_path, **options)
    assert (tmp_path / "data.safetensors").is_file()
    assert list((tmp_path / "checkpoints").rglob("*.safetensors"))
