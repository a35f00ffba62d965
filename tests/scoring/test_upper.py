"""`score --upper quadratic`: tighter rows, a fingerprint of its own, refused where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lipfast
from lipfast.errors import ArgumentError


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
