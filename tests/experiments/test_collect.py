"""The collecting step on a real, tiny run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

import lipfast
from experiments.collect import collect, finding_of
from experiments.errors import ConfigError
from experiments.findings.sources import Sources, spread
from experiments.report import describe_settings, verdict_lines
from experiments.results import read_results
from experiments.study import load_study
from experiments.sweep import open_sweep, train_sweeps
from lipfast.errors import StoreError

_COMMON = """
[scales.tiny]
widths = [2, 3]
seeds = [0, 1]
train_size = 40
optimizer = "adam"
lr = 0.01
steps = 6
checkpoints = 2
path_length = true
log_points = 2
"""
_FILES = {
    "C1-width-fcn-ce": _COMMON,
    "C2-width-fcn-mse": _COMMON + 'loss = "mse"\ntarget_scale = 10\n',
    "D-bias-variance": 'uses = ["C2-width-fcn-mse"]\n[scales.tiny]\n',
    "F7-histograms": 'uses = ["C1-width-fcn-ce"]\n[scales.tiny]\n',
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    for name, text in _FILES.items():
        (root / f"{name}.toml").write_text(text)
    for name in list(_FILES)[:2]:
        sweeps = [(c, open_sweep(c, root)) for c in load_study(name, "tiny", root).sweeps]
        train_sweeps(sweeps)
        for config, folder in sweeps:
            lipfast.score(
                str(folder.checkpoints),
                arch=f"experiments.models:{config.model}",
                data=f"{folder.data}:x_train",
                out=folder.scores,
            )
    return root


def test_last_scores_and_metrics_are_kept(trained: Path) -> None:
    path = collect(load_study("C1-width-fcn-ce", "tiny", trained), trained)
    assert path == trained / "results-tiny" / "C1-width-fcn-ce.parquet"
    results = read_results("C1-width-fcn-ce", path.parent)
    assert results is not None
    assert results.settings["C1-width-fcn-ce"]["train_size"] == 40
    rows = results.rows
    assert sorted(zip(rows["width"], rows["seed"], strict=True)) == [
        (width, seed) for width in (2, 3) for seed in (0, 1)
    ]
    assert set(rows["step"]) == {6}
    assert (rows["certified"] <= rows["upper"]).all()
    assert (rows["mean"] <= rows["lower"]).all()
    assert (rows["path_length"] > 0).all()
    assert "C1: " in verdict_lines("C1-width-fcn-ce", path.parent)[-1]


def test_what_was_scored_with_quadratic_constraints_is_collected_with_them(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    study = load_study("C1-width-fcn-ce", "tiny", trained)
    (config,) = study.sweeps
    folder = open_sweep(dataclasses.replace(config, upper="quadratic"), tmp_path)
    lipfast.score(
        str(folder.checkpoints),
        arch="experiments.models:fcn",
        data=f"{folder.data}:x_train",
        out=folder.scores,
        upper="quadratic",
    )
    tight, wide = (
        read_results(study.name, collect(study, out, tmp_path / place).parent)
        for place, out in (("tight", tmp_path), ("wide", trained))
    )
    assert tight is not None
    assert wide is not None
    assert (tight.rows["upper"] < wide.rows["upper"]).all()
    assert (tight.rows["certified"] <= tight.rows["upper"]).all()
    assert "`upper` quadratic" in describe_settings(tight.settings)
    assert "upper" not in describe_settings(wide.settings)


def test_networks_are_evaluated(trained: Path) -> None:
    collect(load_study("D-bias-variance", "tiny", trained), trained)
    results = read_results("D-bias-variance", trained / "results-tiny")
    assert results is not None
    rows = results.rows
    np.testing.assert_allclose(rows["bias"] + rows["variance"], rows["test_loss"])
    assert (rows["certified"] >= rows["estimate"]).all()
    assert (rows["certified"] >= rows["variance"]).all()
    # The mean over seeds of the stored test losses is the loss that is split.
    sweep = Sources("C2-width-fcn-mse", "tiny", trained).sweep()
    stored = [row["test_loss"] for row in sweep.last_scores() if row["width"] == 2]
    assert rows["test_loss"][0] == pytest.approx(np.mean(stored), rel=1e-5)


def test_histograms_hold_every_sample(trained: Path) -> None:
    collect(load_study("F7-histograms", "tiny", trained), trained)
    results = read_results("F7-histograms", trained / "results-tiny")
    assert results is not None
    for width in (2, 3):
        assert results.rows.where(width=width)["share"].sum() == pytest.approx(1)
    sweep = Sources("C1-width-fcn-ce", "tiny", trained).sweep()
    stored = max(row["lower"] for row in sweep.last_scores() if row["width"] == 3)
    assert results.rows.where(width=3)["largest"][0] == pytest.approx(stored, rel=1e-5)


def test_what_is_missing_is_said(trained: Path, tmp_path: Path) -> None:
    study = load_study("C1-width-fcn-ce", "tiny", trained)
    with pytest.raises(StoreError, match="run: python -m experiments run C1-width-fcn-ce"):
        collect(study, tmp_path)
    with pytest.raises(ConfigError, match="no section"):
        finding_of("double-descent")
    with pytest.raises(StoreError, match="no scored sweep 'wide'"):
        Sources("C1-width-fcn-ce", "tiny", trained).sweep(variant="wide")
    sources = Sources("G-robustness", "tiny", trained)
    assert len(sources.available([("C1-width-fcn-ce", None), ("C3-width-cnn", None)])) == 1
    with pytest.raises(StoreError, match="C3-width-cnn"):
        sources.available([("C3-width-cnn", None)])


def test_spread_keeps_both_ends() -> None:
    assert spread([0, 5], 12) == [0, 5]
    assert spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
