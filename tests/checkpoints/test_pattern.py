from __future__ import annotations

import pytest

from lipfast.checkpoints import Pattern
from lipfast.checkpoints.pattern import customary, customary_path, run_folder
from lipfast.errors import ArgumentError


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{run}/step_{step:d}.pt", "/a/w64/step_0010.pt", {"run": "w64", "step": 10}),
        ("{run}/step_{step:d}.pt", "w64/step_-1.pt", {"run": "w64", "step": -1}),
        ("{run}/step_{step:d}.pt", "/a/w64/step_x.pt", None),
        ("{run}/step_{step:d}.pt", "/a/w64/step_1.pth", None),
        ("w{width:d}-lr{lr:f}/*.pt", "/a/w64-lr1e-3/last.pt", {"width": 64, "lr": 1e-3}),
        ("{run:path}/{}.pt", "/a/b/c.pt", {"run": "/a/b"}),
        ("{a}/**/x.pt", "/r/1/2/x.pt", {"a": "r"}),
        ("{a}/**/x.pt", "/r/x.pt", {"a": "r"}),
        ("{a}_{b}.pt", "/q/x_y_z.pt", {"a": "x", "b": "y_z"}),
        ("a.b/{n}", "/axb/c", None),
        ("{name:s}.pt", "/007.pt", {"name": "007"}),
        ("{step:d}.pt", f"/{'9' * 30}.pt", {"step": "9" * 30}),
    ],
)
def test_match(pattern, path, expected):
    assert Pattern(pattern).match(path) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("run/step.pt", "expected fields"),
        ("{run}/{run}", "'run' twice"),
        ("{step:q}", "unknown type ':q'"),
        ("{run", "expected fields"),
        ("{a}/{b!r}", "expected fields"),
        ("{1a}", "twice, or no name"),
    ],
)
def test_malformed(pattern, message):
    with pytest.raises(ArgumentError, match=message):
        Pattern(pattern)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("epoch=3-step=100", {"epoch": 3, "step": 100}),
        ("checkpoint-500", {"step": 500}),
        ("model_step_000100_ema", {}),
        ("ckpt12", {"step": 12}),
        ("Epoch-2", {"epoch": 2}),
        ("global_step100", {"step": 100}),
        ("iter_0000500", {"step": 500}),
        ("step=100", {"step": 100}),
        ("steps_100", {"step": 100}),
        ("iteration-7", {"step": 7}),
        ("ckpt_100k", {"step": 100_000}),
        ("iter_2M", {"step": 2_000_000}),
        ("ckpt_1.5M", {"step": 1_500_000}),
        ("step_2.5k", {"step": 2500}),
        ("step_2.5", {}),
        ("epoch_2.5", {"epoch": 2.5}),
        ("epoch_3.0", {"epoch": 3}),
        ("steps_per_epoch_10_step_5", {"step": 5}),
        ("epochs_100_step_5", {"step": 5}),
        ("step_5_epochs_100", {"step": 5}),
        ("warmup_steps100_epoch_3", {"epoch": 3}),
        ("max_steps_1000_step_20", {"step": 20}),
        ("max-epochs=100", {}),
        ("steps_1000", {"step": 1000}),
        ("superstep_5", {}),
        ("epoch_10", {"epoch": 10}),
        ("epoch=3-step=1000-v1", {"epoch": 3, "step": 1000}),
        ("epoch=03-val_loss=0.12", {"epoch": 3}),
        ("epoch_3_step_100", {"epoch": 3, "step": 100}),
        ("net_e10", {"epoch": 10}),
        ("net_ep10", {"epoch": 10}),
        ("net_epoch_10", {"epoch": 10}),
        ("10_net_G", {"epoch": 10}),
        ("rl_model_1000_steps", {"step": 1000}),
        ("model_10epochs", {"epoch": 10}),
        ("model_0004999", {"step": 4999}),
        ("model_000100", {"step": 100}),
        ("0050000", {"step": 50000}),
        ("network-snapshot-000200", {"step": 200}),
        ("latest_net_G", {}),
        ("run_000100", {}),
        ("resnet50", {}),
        ("e5-large", {}),
        ("it5-base", {}),
        ("gpt2", {}),
        ("lr1e-3", {}),
        ("w64", {}),
        ("20240101", {}),
        ("timestep5", {}),
        ("step" + "9" * 30, {}),
    ],
)
def test_customary_names(name, expected):
    assert customary(name) == expected


def test_levels_that_trainers_add_are_not_the_run():
    assert run_folder("exp/lightning_logs/version_3/checkpoints") == "exp/lightning_logs/version_3"
    assert run_folder("bert/checkpoint-500") == "bert"
    assert run_folder("checkpoint-500") == "checkpoint-500"
    assert run_folder("a/global_step100/checkpoint") == "a"
    assert run_folder("a/iter_0000500/mp_rank_00") == "a"
    assert run_folder("a/epoch=3-step=7.ckpt") == "a"
    assert run_folder("a/ckpt-w64") == "a/ckpt-w64"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/r/global_step100/mp_rank_00_model_states.pt", {"step": 100}),
        ("/r/epoch=3-step=7.ckpt/checkpoint/m.pt", {"epoch": 3, "step": 7}),
        ("/r/step_7/step_9.pt", {"step": 9}),
        ("/r/epoch_3/step_9.pt", {"epoch": 3, "step": 9}),
        ("/step_7/w64/m.pt", {}),
        ("/r/step10/.metadata", {"step": 10}),
        ("m.pt", {}),
    ],
)
def test_customary_paths(path, expected):
    assert customary_path(path) == expected
