from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from experiments.analysis import (
    neighbouring,
    peak_widths,
    summarise,
)
from lipfast.errors import StoreError


def test_summary_is_of_the_last_step_over_seeds(scores: pa.Table) -> None:
    summary = summarise(scores)
    assert summary.widths.tolist() == [4, 8, 16, 32, 64]
    assert summary.seeds.tolist() == [2] * 5
    assert summary.mean["upper"][1] == pytest.approx(11 * 2.05)
    assert summary.std["upper"][1] == pytest.approx(np.std([22.0, 23.1], ddof=1))
    assert summary.std["train_loss"].tolist() == [0.0] * 5


def test_peaks_and_alignment(scores: pa.Table) -> None:
    summary = summarise(scores)
    assert peak_widths(summary) == {"test_loss": 16, "lower": 8, "upper": 8}
    assert neighbouring(summary.widths, 16, 8)
    assert neighbouring(summary.widths, 16, 16)
    assert not neighbouring(summary.widths, 16, 4)
    assert not neighbouring([4, 8, 12, 16], 8, 16)


def test_text_metadata_are_numbers(scores: pa.Table) -> None:
    index = scores.column_names.index("meta.width")
    text = [str(width) for width in scores["meta.width"].to_pylist()]
    summary = summarise(scores.set_column(index, "meta.width", pa.array(text)))
    assert summary.widths.tolist() == [4, 8, 16, 32, 64]


def test_unusable_scores_are_refused(scores: pa.Table) -> None:
    with pytest.raises(StoreError, match=r"no column meta\.test_loss"):
        summarise(scores.drop_columns(["meta.test_loss"]))
    with pytest.raises(StoreError, match="no checkpoint"):
        summarise(scores.slice(scores.num_rows - 1))
