"""`score --upper quadratic`: tighter rows, a fingerprint of its own, refused where it has none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.upper.quadratic import bounds
from lipfast.estimators.upper.quadratic.stacked_quadratic import ProvedLater
from tests.support.pretended_device import CUDA, pretended_device


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    for step in range(6):
        torch.manual_seed(0)
        model = _mlp(8)
        state = {name: tensor * (1 + 0.01 * step) for name, tensor in model.state_dict().items()}
        save_file(state, tmp_path / f"run_step{step}.safetensors")
    return tmp_path


def _scored(archive: Path, out: Path, **options: object) -> dict[str, list[object]]:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    lipfast.score(archive, arch=_mlp, data=x, out=out, arch_args={"width": 8}, **options)  # type: ignore[arg-type]
    columns = lipfast.read_scores(out).sort_by("uri").to_pydict()
    return {name: list(values) for name, values in columns.items()}


def test_rows_are_tighter_and_say_how(
    archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("stores")
    before = _scored(archive, out / "product")
    found = _scored(archive, out / "quadratic", upper="quadratic", batch_size=2)
    assert set(before["upper_method"]) == {"product of certified spectral norms"}
    assert set(found["upper_method"]) == {"quadratic constraints"}
    for lower, tight, wide in zip(before["lower"], found["upper"], before["upper"], strict=True):
        assert lower <= tight < wide  # type: ignore[operator]
    assert all(found["upper_certified"])
    plan = lipfast.compile(_mlp(8), torch.zeros(1, 4))
    assert plan.upper(_mlp(8).state_dict(), method="quadratic").certified


def test_another_method_is_scored_anew(
    archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("stores") / "store"
    before = _scored(archive, out)
    found = _scored(archive, out, upper="quadratic")
    assert len(found["uri"]) == 2 * len(before["uri"])
    assert found["upper_method"].count("quadratic constraints") == len(before["uri"])
    again = _scored(archive, out, upper="quadratic")
    assert again == found


def test_methods_that_are_none_are_refused_at_once(archive: Path, tmp_path: Path) -> None:
    for options in ({"upper": "sdp"}, {"upper": "quadratic", "norm": 1}):
        with pytest.raises(ArgumentError):
            _scored(archive, tmp_path / "store", **options)


def test_on_a_device_runs_go_on_from_the_batch_before(
    archive: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, begun = tmp_path_factory.mktemp("stores"), []
    known = _scored(archive, out / "cpu", upper="quadratic", batch_size=2)
    queued = bounds.ProvedLater

    def seen(*args: object, **options: Any) -> ProvedLater:
        begun.append(options["start"])
        return queued(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bounds, "ProvedLater", seen)
    with pretended_device():
        found = _scored(archive, out / "cuda", upper="quadratic", batch_size=2, device="cuda")
    assert set(found["upper_method"]) == {"quadratic constraints"}
    assert all(found["upper_certified"])
    for lower, tight, other in zip(found["lower"], found["upper"], known["upper"], strict=True):
        assert lower <= tight <= 1.01 * other  # type: ignore[operator]
    assert begun[0] is None and len(begun) == 3
    assert all(own.device == CUDA for start in begun[1:] for own in start)
