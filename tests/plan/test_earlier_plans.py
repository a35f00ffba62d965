"""Plans that an earlier version saved are loaded; see tests/data/9143729/README.md."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import lipfast

DATA = Path(__file__).parent.parent / "data" / "9143729"
MODELS = runpy.run_path(str(DATA / "models.py"))
TORCH, *LINES = (DATA / "plans" / "fingerprints.txt").read_text().splitlines()
STORED = {name: (mark, float(low), float(high)) for name, mark, low, high in map(str.split, LINES)}


def test_there_is_a_plan_of_every_model() -> None:
    assert list(STORED) == list(MODELS["EXAMPLES"])


@pytest.mark.parametrize("name", STORED)
def test_it_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    path = DATA / "plans" / f"{name}.json"
    plan = lipfast.Plan.load(path)
    assert plan.fingerprint == STORED[name][0]
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", STORED)
def test_it_bounds_as_the_plan_of_today_does(name: str) -> None:
    model, x = MODELS["model"](name), MODELS["samples"](name)
    plan, today = lipfast.Plan.load(DATA / "plans" / f"{name}.json"), lipfast.compile(model, x[:2])
    _, low, high = STORED[name]
    state_dict = model.state_dict()
    upper, lower = plan.upper(state_dict), plan.lower(state_dict, x)
    assert upper.certified
    assert max(low, lower.value) <= min(high, upper.value)
    assert upper.value == pytest.approx(today.upper(state_dict).value, rel=1e-3)
    assert lower.value == pytest.approx(today.lower(state_dict, x).value, rel=1e-3)
    assert plan.bounds(state_dict, x).upper.value == upper.value


@pytest.mark.parametrize("name", STORED)
def test_the_model_still_has_that_fingerprint(name: str) -> None:
    if torch.__version__.split(".")[:2] != TORCH.split(".")[:2]:
        # Another torch.export may write a model with other ops: that is no fault of the plans.
        pytest.skip(f"written with torch {TORCH}, this is {torch.__version__}")
    plan = lipfast.compile(MODELS["model"](name), MODELS["samples"](name)[:2])
    assert plan.fingerprint == STORED[name][0]
