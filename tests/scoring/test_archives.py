"""Whole runs over archives of other kinds, over parts of them, and over ones that grow."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint
from safetensors.torch import save_file

from lipfast.errors import ArgumentError
from lipfast.scoring import Progress, budget, read_scores, score
from lipfast.scoring.architectures import ModelFamily
from lipfast.scoring.budget import BudgetError, elements_allowed
from lipfast.scoring.watch import looks
from tests.support.toy_archive import toy_state, write_toy


@pytest.fixture
def arguments(toy_models, samples, tmp_path) -> dict:
    return {"arch": toy_models, "data": samples, "out": tmp_path / "s"}


def column(store: Path, name: str) -> list:
    return read_scores(store)[name].to_pylist()


def test_metadata_from_a_pattern_a_manifest_and_a_sidecar(arguments, tmp_path):
    for width in (4, 6):
        for step in (1, 2):
            path = tmp_path / "a" / f"w{width}" / f"{step}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(toy_state(width, step), path)
    summary = score(tmp_path / "a", **arguments, pattern="w{width:d}/{step:d}.pt")
    assert (summary.scored, summary.plans) == (4, 2)
    assert column(arguments["out"], "meta.width") == [4, 4, 6, 6]
    again = score(tmp_path / "a", **arguments, pattern="w{width:d}/{step:d}.pt")
    assert (again.scored, again.skipped) == (0, 4)
    # Another meaning of the same paths is another score.
    other = score(tmp_path / "a", **arguments, pattern="w{width:d}/{epoch:d}.pt")
    assert (other.scored, other.skipped) == (4, 0)

    (tmp_path / "runs.csv").write_text(
        "path,width,run\na/w4/1.pt,4,x\na/w6/1.pt,6,y\na/w6/3.pt,6,y\n"
    )
    listed = {**arguments, "out": tmp_path / "listed"}
    summary = score(tmp_path / "runs.csv", **listed)
    assert (summary.scored, summary.failed) == (2, 1)
    assert summary.reasons == {"cannot be reached": 1}
    assert column(tmp_path / "listed", "run") == ["x", "y", "y"]

    for width in (4, 6):
        (tmp_path / "a" / f"w{width}" / "config.json").write_text(json.dumps({"width": width}))
    assert score(tmp_path / "a", **{**arguments, "out": tmp_path / "side"}).scored == 4


def test_a_zip_file_and_its_resumption(arguments, archive, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        for path in archive.rglob("*.safetensors"):
            packed.write(path, path.relative_to(archive))
    score(archive, **{**arguments, "out": tmp_path / "folder"})
    assert score(tmp_path / "a.zip", **arguments).scored == 12
    assert score(tmp_path / "a.zip", **arguments).skipped == 12
    for name in ("upper", "lower", "run"):
        assert column(arguments["out"], name) == column(tmp_path / "folder", name)


def test_a_network_inside_a_module_that_trained_it(arguments, tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    state = {f"model.{name}": value for name, value in toy_state(4).items()}
    content = {"state_dict": {**state, "loss.weight": torch.ones(3)}, "width": 4}
    torch.save(content, root / "last.ckpt")
    save_file(toy_state(4), root / "plain.safetensors", {"width": "4"})
    assert score(root, **arguments).scored == 2
    assert len(set(column(arguments["out"], "upper"))) == 1


def test_states_of_optimizers_are_counted_not_scored(arguments, tmp_path):
    root = tmp_path / "a"
    for step in (5, 10):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        torch.save({"model": toy_state(4), "width": 4}, folder / "model.pt")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"state": {}}, folder / name)
        torch.save({"state": {0: {"m": torch.ones(2)}}, "param_groups": []}, folder / "adam.pt")
    summary = score(root, **arguments)
    assert (summary.found, summary.scored, summary.failed, summary.aside) == (2, 2, 0, 8)
    assert "  8 files left aside: states of optimizers and the like, no weights" in str(summary)
    assert column(arguments["out"], "run") == ["a", "a"]
    assert column(arguments["out"], "step") == [5, 10]
    again = score(root, **arguments)
    assert (again.found, again.skipped, again.failed, again.aside) == (2, 2, 0, 8)
    assert score(root, **arguments, dry_run=True).aside == 8


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_torch_distributed(arguments, tmp_path):
    folder = tmp_path / "a" / "step_3"
    folder.mkdir(parents=True)
    content = {"model": toy_state(4), "ema": toy_state(4, 1), "width": 4}
    torch.distributed.checkpoint.save(content, checkpoint_id=str(folder))
    torch.save({"model": toy_state(4), "width": 4}, tmp_path / "a" / "b.pt")
    assert score(tmp_path / "a", **arguments).scored == 2
    assert len(set(column(arguments["out"], "upper"))) == 1
    assert column(arguments["out"], "step") == [3, None]
    assert column(arguments["out"], "note")[1] is None
    assert "'ema' fits, too" in column(arguments["out"], "note")[0]
    again = score(tmp_path / "a", **arguments)
    assert (again.scored, again.skipped) == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_bounded_as_what_it_is(arguments, tmp_path, dtype):
    root = tmp_path / "a"
    root.mkdir()
    state = {name: value.to(dtype) for name, value in toy_state(4).items()}
    save_file(state, root / "half.safetensors", {"width": "4"})
    wide = {name: value.float() for name, value in state.items()}
    save_file(wide, root / "wide.safetensors", {"width": "4"})
    assert score(root, **arguments).scored == 2
    half, full = column(arguments["out"], "upper")
    assert half == pytest.approx(full, rel=1e-6)
    assert all(column(arguments["out"], "upper_certified"))


# Parts of an archive


def test_conditions_and_every(arguments, archive, tmp_path):
    summary = score(archive, **arguments, where=["width = 4", "step >= 2"])
    assert (summary.scored, summary.left_out) == (4, 8)
    assert "8 left out by --where or --every" in str(summary)
    assert set(column(arguments["out"], "step")) == {2, 10}
    second = {**arguments, "out": tmp_path / "every"}
    summary = score(archive, **second, every=2)
    assert (summary.scored, summary.left_out) == (8, 4)
    assert set(column(tmp_path / "every", "step")) == {1, 10}


def test_a_limit_counts_what_the_conditions_leave(arguments, archive):
    summary = score(archive, **arguments, where="step = 10", limit=3)
    assert summary.scored == 3
    assert set(column(arguments["out"], "step")) == {10}
    summary = score(archive, **arguments, where="step = 10", limit=3)
    assert (summary.scored, summary.skipped) == (1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"where": "step"}, "expected KEY OP VALUE"),
        ({"pattern": "x"}, "expected fields"),
        ({"pattern": "{run}/nothing{n}.bin"}, "describes none of 12 paths"),
        ({"every": 0}, "every 0"),
        ({"watch": 0}, "watch 0"),
        ({"watch": float("nan")}, "watch nan"),
        ({"workers": 0}, "workers 0"),
    ],
)
def test_wrong_options(arguments, archive, change, message):
    with pytest.raises(ArgumentError, match=message):
        score(archive, **arguments, **change)


def test_dry_run_says_how_long_it_takes(arguments, archive):
    summary = score(archive, **arguments, dry_run=True)
    assert summary.plans == 2
    assert summary.estimate is not None
    assert 0 < summary.estimate < 60
    assert "scoring them takes about" in str(summary)
    assert summary.to_dict()["estimate"] == summary.estimate
    assert not arguments["out"].exists()


# Growing archives


def test_files_are_finished_once_they_are_old_or_stay_the_same(tmp_path):
    from lipfast.checkpoints import find_checkpoints  # noqa: PLC0415

    old, new = tmp_path / "old.pt", tmp_path / "new.pt"
    old.write_bytes(b"1")
    os.utime(old, (1, 1))
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            new.write_bytes(b"12")
        if len(slept) == 1:
            new.write_bytes(b"1")

    found = looks(lambda: find_checkpoints(tmp_path), 5.0, sleep)
    seen = [[Path(file.path).name for file in next(found)] for _ in range(4)]
    assert seen == [["old.pt"], ["old.pt"], ["old.pt"], ["new.pt", "old.pt"]]
    assert slept == [5.0] * 3


def test_watching_scores_what_appears(arguments, tmp_path):
    root = tmp_path / "growing"

    def look(at: Progress) -> None:
        if at.done == 1:
            write_toy(root / "r" / "step2.safetensors", 4, step=2)
        if at.done == 2:
            raise KeyboardInterrupt

    write_toy(root / "r" / "step1.safetensors", 4, step=1)
    os.utime(root / "r" / "step1.safetensors", (1, 1))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        score(root, **arguments, watch=0.1, progress=look)
    assert time.monotonic() - started < 60
    assert column(arguments["out"], "step") == [1, 2]


def test_watching_a_folder_that_is_not_there_yet_ends_with_the_limit(
    arguments, tmp_path, monkeypatch
):
    root = tmp_path / "later"
    monkeypatch.setattr(
        "lipfast.scoring.watch.looks.__defaults__",
        (
            lambda seconds: (
                write_toy(root / "r" / "a.safetensors", 4) if not root.exists() else None
            ),
        ),
    )
    assert score(root, **arguments, watch=5.0, limit=1).scored == 1


# Metadata that lies


def test_metadata_that_asks_for_a_giant_model(arguments, tmp_path):
    root = tmp_path / "a"
    root.mkdir()
    for name, value in {
        "wide": {"width": 10**9},
        "deep": {"width": 4, "depth": 10**9},
        "loop": {"width": 1, "depth": 10**6},
    }.items():
        metadata = {key: str(number) for key, number in value.items()}
        save_file(toy_state(4), root / f"{name}.safetensors", metadata)
    save_file(toy_state(4), root / "good.safetensors", {"width": "4"})
    summary = score(root, **arguments)
    assert (summary.scored, summary.failed) == (1, 3)
    assert summary.reasons == {"metadata asks for a far larger model": 3}


def test_a_giant_claim_does_not_stain_an_honest_checkpoint(toy_models, samples, monkeypatch):
    monkeypatch.setattr(budget, "_FLOOR", 10_000)
    architecture = ModelFamily(toy_models)
    wide, deep = (("width", 50_000),), (("depth", 9000), ("width", 4))
    for arguments in (wide, deep):
        with pytest.raises(BudgetError, match="far beyond what the checkpoint"):
            architecture.plan(arguments, samples, elements_allowed(100))
    assert architecture.plan(wide, samples, elements_allowed(400_000)).layers
    override = ModelFamily(toy_models, {"width": 50_000})
    with pytest.raises(BudgetError, match="asks for a model of more than"):
        override.plan(wide, samples, elements_allowed(100))


def test_a_name_with_newlines_is_one_row(arguments, tmp_path):
    root = tmp_path / "a"
    write_toy(root / "a\n\x1b[2J.safetensors", 4)
    stream = io.BytesIO(b"rubbish\n")
    (root / "b\nc.pt").write_bytes(stream.getvalue())
    summary = score(root, **arguments)
    assert (summary.scored, summary.failed) == (1, 1)
    assert all("\n" not in uri and "\x1b" not in uri for uri in column(arguments["out"], "uri"))
    assert "\x1b" not in str(summary)
