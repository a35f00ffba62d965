"""A store that an earlier version wrote is read and resumed; see tests/data/9143729/README.md.

If METHOD changes, so that scores are others on purpose, all is scored anew: then say so here.
"""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save

from lipfast.scoring import Summary, compact_store, read_scores, score, verify_store

DATA = Path(__file__).parent.parent / "data" / "9143729"
MLP = runpy.run_path(str(DATA / "models.py"))["mlp"]


@pytest.fixture
def archive() -> Iterator[str]:
    """The checkpoints where they were, with the times of change that they had."""
    memory = fsspec.filesystem("memory")
    for path, changed in json.loads((DATA / "mtimes.json").read_text()).items():
        memory.pipe_file(path, (DATA / path.lstrip("/")).read_bytes())
        memory.store[path].created = datetime.fromtimestamp(changed, timezone.utc)
    yield "memory://checkpoints"
    memory.rm("/checkpoints", recursive=True)


@pytest.fixture
def store(tmp_path) -> Path:
    return Path(shutil.copytree(DATA / "scores", tmp_path / "scores"))


def scored(archive: str, out: Path) -> Summary:
    x = torch.arange(20.0).reshape(5, 4) / 8 - 1
    return score(archive, arch=MLP, data=x, out=out)


def add_checkpoint(width: int) -> None:
    torch.manual_seed(3)
    values = {"width": str(width), "step": "3"}
    content = save(MLP(width).state_dict(), values)
    fsspec.filesystem("memory").pipe_file(f"/checkpoints/w{width}/step3.safetensors", content)


def test_it_is_read(store):
    assert verify_store(store).problems == ()
    table = read_scores(store).to_pydict()
    assert table["run"] == ["w4", "w4", "w6", "w6"]
    assert (table["step"], table["meta.width"]) == ([1, 2, 10, 20], [4, 4, 6, 6])
    assert table["status"] == ["ok", "ok", "ok", "error"]
    assert (table["kind"][:3], table["kind"][3]) == ([None] * 3, "NaN or infinite weights")
    assert "0.weight" in table["error"][3]
    assert all(
        lower <= upper for lower, upper in zip(table["lower"][:3], table["upper"][:3], strict=True)
    )
    assert read_scores(store, "layers")["name"].to_pylist() == ["0", "2", "4"] * 3


def test_nothing_is_scored_anew(archive, store):
    before = read_scores(store)
    summary = scored(archive, store)
    assert (summary.found, summary.skipped, summary.scored) == (4, 3, 0)
    kept = [index for index, status in enumerate(before["status"].to_pylist()) if status == "ok"]
    assert read_scores(store).take(kept).equals(before.take(kept))


def test_one_more_checkpoint_makes_one_more_row(archive, store):
    before = read_scores(store)
    for width in (4, 8):  # of a plan that the store knows, and of one that it does not
        add_checkpoint(width)
    assert scored(archive, store).scored == 2
    for _ in range(2):
        table = read_scores(store)
        assert table.schema == before.schema
        assert list(zip(table["run"].to_pylist(), table["step"].to_pylist(), strict=True)) == [
            *(("w4", step) for step in (1, 2, 3)),
            *(("w6", step) for step in (10, 20)),
            ("w8", 3),
        ]
        fingerprints = table["fingerprint"].to_pylist()
        assert (len(set(fingerprints[:3])), len(set(fingerprints))) == (1, 3)
        assert table.take([0, 1, 3]).equals(before.take([0, 1, 2]))
        compact_store(store)


def test_scored_again_the_brackets_overlap(archive, store, tmp_path):
    assert scored(archive, tmp_path / "again").scored == 3
    for table, count in (("checkpoints", 3), ("layers", 9)):
        old, new = (read_scores(path, table).to_pydict() for path in (store, tmp_path / "again"))
        assert (new["uri"], new["fingerprint"]) == (old["uri"], old["fingerprint"])
        for index in range(count):
            low = max(old["lower"][index], new["lower"][index])
            assert low <= min(old["upper"][index], new["upper"][index])
    old, new = (read_scores(path).to_pydict() for path in (store, tmp_path / "again"))
    for name in ("jacobian_max", "mean", "rms"):
        assert new[name][:3] == pytest.approx(old[name][:3], rel=1e-4)
