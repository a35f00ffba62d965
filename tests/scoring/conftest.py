"""A toy archive of small perceptrons of several widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.toy_archive import TOY_MODELS, write_toy


@pytest.fixture
def toy_models(tmp_path, monkeypatch) -> str:
    """The name of an importable function; its module lies in the current folder."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "lipfast_toy_models.py").write_text(TOY_MODELS)
    monkeypatch.chdir(folder)
    return "lipfast_toy_models:mlp"


@pytest.fixture
def archive(tmp_path) -> Path:
    """Two widths, two runs each, three checkpoints per run."""
    root = tmp_path / "archive"
    for width in (4, 6):
        for seed in (0, 1):
            for step in (2, 10, 1):
                path = root / f"w{width}s{seed}" / f"step{step}.safetensors"
                write_toy(path, width, seed=seed, step=step, loss=1 / step)
    return root


@pytest.fixture
def samples() -> Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
