from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.data import ClassificationData
from lipfast.errors import CheckpointError


def test_data_round_trip_and_damage(tmp_path: Path, small_data: ClassificationData) -> None:
    path = tmp_path / "data.safetensors"
    small_data.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.safetensors"]
    loaded = ClassificationData.load(path)
    assert torch.equal(loaded.x_train, small_data.x_train)
    assert torch.equal(loaded.y_test, small_data.y_test)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"data\.safetensors: not a data file"):
        ClassificationData.load(path)
