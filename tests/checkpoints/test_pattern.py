from __future__ import annotations

import pytest

from lipfast.checkpoints import Pattern
from lipfast.checkpoints.pattern import customary, run_folder
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
