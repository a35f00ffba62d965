from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from experiments.analysis import COLUMNS
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.settings import parse_settings

MakeConfig = Callable[..., SweepConfig]


@pytest.fixture
def make_config() -> MakeConfig:
    def make(**settings: Any) -> SweepConfig:
        basic = {"widths": [3, 5, 8], "seeds": [0, 1], "steps": 6, "lr": 0.01, "checkpoints": 3}
        return parse_settings("test", "small", {**basic, "train_size": 24, **settings})

    return make


@pytest.fixture
def small_data() -> ClassificationData:
    generator = torch.Generator().manual_seed(7)
    return ClassificationData(
        x_train=torch.randn(24, 40, generator=generator),
        y_train=torch.randint(10, (24,), generator=generator),
        x_test=torch.randn(11, 40, generator=generator),
        y_test=torch.randint(10, (11,), generator=generator),
    )


@pytest.fixture
def scores() -> pa.Table:
    """Scores of widths 4 to 64 whose test loss peaks at 16, bounds at 8, one row an error."""
    peaks = {"test_loss": 16, "upper": 8, "lower": 8, "mean": 8}
    rows: list[dict[str, Any]] = []
    for width in (4, 8, 16, 32, 64):
        for seed in (0, 1):
            for step in (0, 1, 10):
                values = {
                    name: (1 + step) * (2 + 0.1 * seed) / (1 + abs(np.log2(width / peak)))
                    for name, peak in peaks.items()
                }
                values["train_loss"] = 1 / width
                values["train_error"] = max(0.0, (32 - width) / 64)
                values["test_error"] = 0.5
                rows.append(
                    {
                        "status": "ok",
                        "step": step,
                        "meta.width": width,
                        "meta.seed": seed,
                        **{COLUMNS[name]: value for name, value in values.items()},
                    }
                )
    broken = dict.fromkeys(rows[0], None)
    rows.append({**broken, "status": "error", "step": 99, "meta.width": 4, "meta.seed": 2})
    return pa.Table.from_pylist(rows)
