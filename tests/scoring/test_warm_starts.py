"""A run that goes on from one batch to the next starts from its last checkpoint's vectors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lipfast.scoring import read_scores, score

RUNS, STEPS = 2, 6


def write_runs(folder: Path) -> nn.Module:
    model = nn.Sequential(nn.Linear(60, 90), nn.ReLU(), nn.Linear(90, 80))
    generator = torch.Generator().manual_seed(0)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for run in range(RUNS):
        state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for step in range(STEPS):
            path = folder / f"run-{run}" / f"step-{step}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(state, path, metadata={"run": f"run-{run}", "step": str(step)})
            state = {
                name: value + 1e-3 * torch.randn(value.shape, generator=generator)
                for name, value in state.items()
            }
    return model


def test_runs_continue_warm_across_batches(tmp_path: Path) -> None:
    model = write_runs(tmp_path / "archive")
    samples = torch.randn(3, 60, generator=torch.Generator().manual_seed(1))
    stores = {"whole": 100, "pairs": 2, "uneven": 4}
    for name, size in stores.items():
        score(tmp_path / "archive", arch=model, data=samples, out=tmp_path / name, batch_size=size)
    layers = {
        name: {
            (row["uri"], row["index"]): row
            for row in read_scores(tmp_path / name, table="layers").to_pylist()
        }
        for name in stores
    }
    passes = {name: sum(row["passes"] for row in found.values()) for name, found in layers.items()}
    assert passes["pairs"] < passes["uneven"] < passes["whole"]
    assert passes["pairs"] < 0.75 * passes["whole"]
    assert len(layers["whole"]) == 2 * RUNS * STEPS
    for key, cold in layers["whole"].items():
        for name in ("pairs", "uneven"):
            warm = layers[name][key]
            assert warm["certified"]
            assert warm["lower"] <= cold["upper"] and cold["lower"] <= warm["upper"]
            assert warm["upper"] - warm["lower"] <= 1e-6 * warm["upper"]


def test_runs_do_not_start_from_each_other(tmp_path: Path) -> None:
    """The first checkpoint of a run is cold, whatever was scored before it."""
    model = write_runs(tmp_path / "archive")
    samples = torch.ones(3, 60)
    score(tmp_path / "archive", arch=model, data=samples, out=tmp_path / "all", batch_size=1)
    score(tmp_path / "archive" / "run-1", arch=model, data=samples, out=tmp_path / "second")
    together, alone = (
        [
            (row["lower"], row["upper"], row["passes"])
            for row in read_scores(tmp_path / name, table="layers").to_pylist()
            if row["uri"].endswith("run-1/step-0.safetensors")
        ]
        for name in ("all", "second")
    )
    assert len(together) == 2
    assert together == alone
