from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

import lipfast
from experiments.brackets import Bracket, Ratios, final_brackets, tightness, tightness_lines
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.sweep import SweepFolder, open_sweep, train_sweep
from experiments.train import Network
from lipfast.errors import StoreError

MakeConfig = Callable[..., SweepConfig]


@pytest.fixture
def scored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_config: MakeConfig,
    small_data: ClassificationData,
) -> Callable[..., tuple[SweepFolder, pa.Table]]:
    """Train and score a small sweep."""

    def make(**settings: object) -> tuple[SweepFolder, pa.Table]:
        monkeypatch.setattr("experiments.task.load_sweep_data", lambda config: small_data)
        config = make_config(optimizer="adam", lr=0.1, upper="quadratic", **settings)
        folder = open_sweep(config, tmp_path)
        train_sweep(config, folder)
        lipfast.score(
            str(folder.checkpoints),
            arch="experiments.models:fcn",
            data=f"{folder.data}:x_train",
            out=folder.scores,
            upper=config.upper,
        )
        return folder, lipfast.read_scores(folder.scores)

    return make


def test_the_truth_lies_in_the_bracket(
    scored: Callable[..., tuple[SweepFolder, pa.Table]],
) -> None:
    folder, table = scored(widths=[3, 8, 20], seeds=[1, 0])
    brackets = final_brackets(folder, table)
    assert [(b.width, b.seed) for b in brackets] == [(w, s) for w in (3, 8, 20) for s in (0, 1)]
    for bracket in brackets:
        assert 0 < bracket.lower <= bracket.found <= bracket.upper < bracket.product
        if bracket.width == 20:
            assert math.isnan(bracket.truth)
        else:
            assert bracket.found == pytest.approx(bracket.truth, rel=1e-6)
            assert bracket.found <= bracket.truth * (1 + 1e-12)
            assert bracket.truth <= bracket.upper * (1 + 1e-12)
    found = tightness(brackets, table)
    assert (found.last.count, found.every.count) == (6, table.num_rows)
    assert found.truth is not None
    assert found.truth.count == 4
    assert 1 <= found.truth.mean <= found.found.mean * 1.1 <= found.product.mean * 1.1
    lines = tightness_lines(found)
    assert lines[0].startswith("upper / lower at the 6 last checkpoints: geometric mean 1.")
    assert any("enumerated for 4 networks" in line for line in lines)


def test_deeper_networks_have_no_enumeration(
    scored: Callable[..., tuple[SweepFolder, pa.Table]],
) -> None:
    folder, table = scored(widths=[4], seeds=[0], depth=2)
    (bracket,) = final_brackets(folder, table)
    assert math.isnan(bracket.truth)
    assert bracket.lower <= bracket.found <= bracket.upper < bracket.product
    assert tightness([bracket], table).truth is None


def test_a_run_that_is_gone_is_named(
    scored: Callable[..., tuple[SweepFolder, pa.Table]],
) -> None:
    folder, table = scored(widths=[4, 5], seeds=[0])
    shutil.rmtree(folder.run(Network(5, 0)))
    with pytest.raises(StoreError, match="width 5, seed 0, was scored and is gone"):
        final_brackets(folder, table)


def test_ratios_leave_out_networks_without_two_bounds() -> None:
    ratios = Ratios.of([2.0, 8.0, 1.0, math.inf], [1.0, 1.0, 0.0, 1.0])
    assert ratios == Ratios(4.0, 8.0, 2)
    assert str(ratios) == "geometric mean 4.000, largest 8.000"
    assert math.isnan(Ratios.of([1.0], [0.0]).mean)


def test_nothing_known_of_the_truth_is_not_said() -> None:
    table = pa.table({"status": ["ok", "error"], "upper": [3.0, None], "lower": [2.0, None]})
    brackets = [Bracket(32, 0, product=6.0, upper=3.0, found=2.5, lower=2.0, truth=math.nan)]
    assert tightness_lines(tightness(brackets, table)) == [
        "upper / lower at the 1 last checkpoint: geometric mean 1.500, largest 1.500",
        "  with the product of norms for upper: geometric mean 3.000, largest 3.000",
        "  with a search for lower: geometric mean 1.200, largest 1.200",
        "upper / lower at all 1 checkpoint: geometric mean 1.500, largest 1.500",
    ]
