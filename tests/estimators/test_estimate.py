"""How estimates print and compare."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lipfast.errors import LipfastError
from lipfast.estimators.calls import bounds
from lipfast.estimators.estimate import Estimate, format_value, log_down
from lipfast.estimators.results import BoundOrderError, check_order
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.table import layer_table


def estimate(value: float, side: str, *, certified: bool = True) -> Estimate:
    return Estimate(value, math.log(value), side, 2, "test", certified)  # type: ignore[arg-type]


def test_order_is_asserted_with_both_numbers() -> None:
    check_order(estimate(1.0, "lower"), estimate(1.0, "upper"))
    with pytest.raises(BoundOrderError, match=r"2\.5 exceeds certified upper bound 1\.5") as raised:
        check_order(estimate(2.5, "lower"), estimate(1.5, "upper"))
    assert isinstance(raised.value, AssertionError)
    assert isinstance(raised.value, LipfastError)
    check_order(estimate(2.5, "lower", certified=False), estimate(1.5, "upper"))


def test_values_beyond_float64_print_as_powers_of_ten() -> None:
    assert format_value(math.inf, 400 * math.log(10) + math.log(2)) == "2.000000e+400"
    assert format_value(math.inf, math.inf) == "inf"
    assert format_value(1.5, math.log(1.5)) == "1.5"


def test_log_of_a_lower_estimate_is_rounded_down() -> None:
    assert log_down(0.0) == -math.inf
    assert log_down(math.e) < 1.0
    assert log_down(math.e) == pytest.approx(1.0)


def bracket(index: int, upper: float, name: str = "layer") -> LayerBracket:
    return LayerBracket(index, name, "linear", (10, 65536), upper, upper, True, "cholesky", 7)


def test_layer_table_fits_a_terminal_and_shows_shares() -> None:
    long = "encoder.blocks.11.attention.projection.output"
    lines = layer_table((bracket(0, math.e**3, long), bracket(1, math.e)))
    assert max(len(line) for line in lines) <= 100
    assert lines[1].endswith("75.0%")
    assert "10x65536" in lines[2]
    assert "yes" in lines[2]


def test_shares_of_layers_that_contract_are_negative() -> None:
    lines = layer_table((bracket(0, math.e**4), bracket(1, math.e**-1)))
    assert lines[1].endswith("133.3%")
    assert lines[2].endswith("-33.3%")


def test_shares_are_left_out_where_they_mean_nothing() -> None:
    assert layer_table((bracket(0, 2.0), bracket(1, 0.5)))[1].endswith("-")
    assert layer_table((bracket(0, 4.0), bracket(1, 0.5)))[1].endswith("-")  # 200% and -100%
    assert layer_table((bracket(0, 2.0), bracket(1, 0.0)))[1].endswith("-")


def test_bounds_print_a_table() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    result = bounds(model, torch.randn(5, 4))
    lines = str(result).splitlines()
    assert max(len(line) for line in lines) <= 100
    assert [line.split()[0] for line in lines[4:]] == [
        "upper",
        "lower",
        "jacobian",
        "mean",
        "rms",
        "ratio",
    ]
    assert lines[1].split()[1:4] == ["0", "linear", "8x4"]
    assert "certified" in repr(result)
    assert result.ratio == pytest.approx(result.upper.value / result.lower.value)
    assert result.mean == result.lower.mean
    assert result.rms >= result.mean
    assert result.layers == result.upper.layers
    assert repr(result.layers[0]).startswith("LayerBracket(0 0: linear 8x4, [")
