from __future__ import annotations

from pathlib import Path

import pytest

from experiments.errors import ConfigError
from experiments.study import (
    describe_sweep,
    find_sweep,
    load_config,
    load_study,
    studies_of,
    sweep_names,
)


def test_every_shipped_scale_is_valid() -> None:
    assert "double-descent" in sweep_names()
    for name in sweep_names():
        for scale in describe_sweep(name)[1]:
            study = load_study(name, scale)
            assert study.sweeps or study.uses
            for config in study.sweeps:
                assert config.checkpoints[0] == 0
                assert config.checkpoints[-1] == config.steps


def test_the_demo_is_large_enough() -> None:
    config = load_config("double-descent", "demo")
    assert len(config.widths) >= 12
    assert len(config.seeds) >= 2
    assert len(config.widths) * len(config.seeds) * len(config.checkpoints) >= 500


STUDY = """
uses = ["other"]
[defaults]
widths = [2]
seeds = [0]
steps = 3
lr = 0.1
checkpoints = 2
[variants.one]
lr = 0.2
[variants.two]
[scales.small]
[scales.large]
steps = 9
[scales.large.variants.two]
widths = [8]
"""


def test_variants_and_uses(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "other.toml").write_text("[defaults]\n" + STUDY.split("[defaults]")[1])
    small = load_study("study", "small", tmp_path)
    assert [(sweep.variant, sweep.lr) for sweep in small.sweeps] == [("one", 0.2), ("two", 0.1)]
    (large,) = load_study("study", "large", tmp_path).sweeps
    assert (large.variant, large.widths, large.steps) == ("two", (8,), 9)
    assert [study.name for study in studies_of(small, tmp_path)] == ["other", "study"]
    with pytest.raises(ConfigError, match="has 2 sweeps of its own"):
        load_config("study", "small", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["other"]', '["othr"]', "uses: unknown study 'othr'; did you mean 'other'"),
        ('["other"]', "[3]", "uses: expected a list of names"),
        ('["other"]', '["study"]', "the studies use one another"),
        ("[variants.two]", "[variants.two]\nlr = -1", r"\[scales.small, variant two\]: lr = -1"),
        ("[variants.one]\nlr = 0.2", "[variants]\none = 2", "variants: expected tables"),
    ],
)
def test_errors_of_variants_name_file_and_variant(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "study.toml").write_text(STUDY.replace(old, new))
    (tmp_path / "other.toml").write_text("[defaults]\n" + STUDY.split("[defaults]")[1])
    with pytest.raises(ConfigError, match=rf"study\.toml: .*{message}"):
        studies_of(load_study("study", "small", tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scales = 3", "scales: expected a table"),
        ("", r"expected at least one table \[scales"),
        ("a = ", "not TOML"),
        ("[scale.demo]", "unknown key 'scale'; did you mean 'scales'"),
        ("[scales.demo]\nlr = 'x'", r"bad\.toml: \[scales\.demo\]: lr = 'x': expected a number"),
        ("[scales.demos]\nlr = 1.0", r"bad\.toml: unknown scale 'demo'; did you mean 'demos'"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config("bad", "demo", tmp_path)


def test_unknown_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "width.toml").write_text("[scales.demo]")
    with pytest.raises(ConfigError, match="unknown sweep 'widht'; did you mean 'width'"):
        load_config("widht", "demo", tmp_path)


def test_a_sweep_may_be_any_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[scales.s]\nwidths=[2]\nseeds=[0]\nsteps=3\nlr=0.1\ncheckpoints=2\n")
    assert load_config("mine", "s", find_sweep(str(path))[1]).widths == (2,)
    with pytest.raises(ConfigError, match="no such file"):
        find_sweep(str(tmp_path / "other.toml"))
    with pytest.raises(ConfigError, match="unknown sweep"):
        load_config(str(path.with_suffix("")), "s")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        load_config("mine", "s", tmp_path)
