from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.config import ConfigError, log_spaced_steps, parse_settings
from experiments.study import (
    describe_sweep,
    find_sweep,
    load_config,
    load_study,
    sweep_names,
)

BASIC: dict[str, Any] = {"widths": [8, 4], "seeds": [0], "steps": 10, "lr": 1, "checkpoints": 3}


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


def test_values_are_normalised() -> None:
    config = parse_settings("s", "t", {**BASIC, "train_size": 100, "batch_size": "full"})
    assert config.widths == (4, 8)
    assert config.batch_size == 100
    assert config.steps_per_epoch == 1
    assert isinstance(config.lr, float)
    assert parse_settings("s", "t", {**BASIC, "batch_size": 512}).steps_per_epoch == 8
    assert parse_settings("s", "t", {**BASIC, "checkpoints": [10, 0]}).checkpoints == (0, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": "adam"}, r"unknown key 'optimiser'; did you mean 'optimizer'\? allowed: "),
        ({"widths": 4}, "widths = 4: expected a list of distinct integers, at least 1"),
        ({"widths": [4, 4]}, "widths = .*: expected a list of distinct integers"),
        ({"seeds": []}, "seeds = .*not empty"),
        ({"steps": 10.5}, "steps = 10.5: expected an integer at least 0"),
        ({"steps": True}, "steps = True: expected an integer"),
        ({"lr": 0}, "lr = 0: expected a finite number above 0"),
        ({"lr": float("nan")}, "lr = nan: expected a finite number"),
        ({"lr": float("inf")}, "lr = inf: expected a finite number"),
        ({"loss": "hinge"}, 'loss = .*one of "cross_entropy", "mse", "nll"'),
        ({"bias": 1}, "bias = 1: expected true or false"),
        ({"label_noise": 1.1}, "label_noise = 1.1: .* at most 1"),
        ({"train_size": 5000}, "train_size = 5000: .* to 4000"),
        ({"checkpoints": 1}, "checkpoints = 1: expected a number of log-spaced checkpoints"),
        ({"checkpoints": [0, 11]}, r"checkpoints ask for step 11, beyond steps \(10\)"),
        ({"batch_size": "half"}, 'batch_size = .*"full" or an integer'),
        ({"batch_size": 64, "train_size": 32}, r"batch_size \(64\) exceeds train_size \(32\)"),
        ({"momentum": 0.9, "optimizer": "adam"}, 'momentum is for optimizer = "sgd"'),
        ({"target_scale": 10.0}, 'target_scale is for loss = "mse"'),
        ({"warmup_steps": 10}, r"warmup_steps \(10\) must be below steps \(10\)"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings("s", "t", {**BASIC, **change})


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ConfigError, match="missing steps, lr"):
        parse_settings("s", "t", {"widths": [4], "seeds": [0], "checkpoints": 3})


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


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 2000, 10**6])
@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_log_spaced_steps(steps: int, count: int) -> None:
    chosen = log_spaced_steps(steps, count)
    assert chosen[0] == 0
    assert chosen[-1] == steps
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(count, steps + 1)


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
