"""Pools and interpolation: exact constants, counted windows, rounding errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lipfast.estimators.plan import Plan
from lipfast.plan.interpret import evaluate
from tests.support.explicit import (
    NORMS,
    Function,
    check_enclosure,
    check_linear,
    check_quotients,
    traced,
)

LINEAR = {
    "average": (nn.AvgPool2d(2), (2, 4, 6)),
    "overlapping": (nn.AvgPool2d(3, 2, 1), (1, 6, 7)),
    "ceil, uncounted": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 6, 7)),
    "ceil, counted": (nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True), (1, 6, 7)),
    "divisor": (nn.AvgPool2d(2, stride=1, divisor_override=3), (1, 4, 5)),
    "one axis": (nn.AvgPool1d(4, 3), (2, 11)),
    "three axes": (nn.AvgPool3d(2), (1, 4, 4, 2)),
    "adaptive": (nn.AdaptiveAvgPool2d((3, 2)), (1, 7, 5)),
    "adaptive to more": (nn.AdaptiveAvgPool1d(7), (1, 5)),
    "global": (nn.AdaptiveAvgPool2d(1), (2, 4, 5)),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), (1, 4, 3)),
    "bilinear, aligned": (nn.Upsample((7, 5), mode="bilinear", align_corners=True), (1, 4, 3)),
    "bilinear, shrinking": (nn.Upsample((2, 3), mode="bilinear"), (1, 5, 7)),
    "odd factor": (nn.Upsample(scale_factor=1.7, mode="bilinear"), (1, 5, 4)),
    "bicubic": (nn.Upsample((7, 9), mode="bicubic"), (1, 4, 3)),
    "linear": (nn.Upsample(scale_factor=3, mode="linear"), (2, 5)),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 3, 2)),
    "nearest": (nn.Upsample(scale_factor=2), (1, 3, 4)),
    "nearest, uneven": (nn.Upsample((5, 7)), (1, 3, 4)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_pools_are_exact(name: str) -> None:
    layer, shape = LINEAR[name]
    check_linear(layer, shape)


MAXIMA = {
    "disjoint": (nn.MaxPool2d(2), (2, 4, 6), 1),
    "overlapping": (nn.MaxPool2d(3, 2, 1), (1, 7, 7), 4),
    "dense": (nn.MaxPool1d(3, 1), (1, 8), 3),
    "dilated": (nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6), 4),
    "ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 6, 6), 4),
    "three axes": (nn.MaxPool3d(2, 1), (1, 3, 3, 3), 8),
    "adaptive": (nn.AdaptiveMaxPool2d((3, 2)), (1, 7, 5), 4),
    "too short to overlap": (nn.MaxPool1d(3, 2), (1, 4), 1),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_count_their_windows(name: str) -> None:
    layer, shape, most = MAXIMA[name]
    plan = traced(layer, shape)
    for norm in NORMS:
        expected = 1.0 if math.isinf(norm) else most ** (1 / norm)
        assert plan.upper({}, norm=norm).value == pytest.approx(expected, rel=1e-15)
    check_quotients(plan, layer, shape)
    check_enclosure(plan, layer, shape, 0.0)  # nothing is rounded


@pytest.mark.parametrize("name", MAXIMA)
def test_maxima_attain_their_constant(name: str) -> None:
    layer, shape, most = MAXIMA[name]
    # One entry stands out: it is the maximum of every window that it is in.
    x = torch.zeros(math.prod(shape), *shape).double()
    x.reshape(len(x), -1).fill_diagonal_(1.0)
    attained = (layer.double()(2 * x) - layer(x)).flatten(1).norm(dim=1).max()
    assert float(attained) == pytest.approx(math.sqrt(most))


@settings(max_examples=15)
@given(st.data())
def test_average_pools_of_all_kinds(data: st.DataObject) -> None:
    draw = data.draw
    kernel = draw(st.integers(1, 5))
    arguments = {
        "kernel_size": kernel,
        "stride": draw(st.integers(1, 6)),
        "padding": draw(st.integers(0, kernel // 2)),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
    }
    size = draw(st.integers(kernel, 12))
    check_linear(nn.AvgPool1d(**arguments), (1, size))


def test_pools_without_a_channel_axis() -> None:
    check_linear(Function(lambda x: functional.avg_pool2d(x, 2)), (4, 4))


def test_long_axes_are_bounded_without_a_matrix() -> None:
    layer = nn.AvgPool1d(5, 2)
    plan = Plan.trace(layer, torch.zeros(2, 1, 40_001))
    # sqrt(||A||_1 ||A||_inf) = sqrt(3/5); the norm itself is below it.
    assert 0.6**0.5 * (1 - 1e-3) <= plan.upper({}).value <= 0.6**0.5 * (1 + 1e-12)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("arguments", [{"scale_factor": 1.3}, {"size": (4, 11)}])
def test_interpolation_is_torchs(mode: str, arguments: dict[str, object]) -> None:
    model = Function(lambda x: functional.interpolate(x, mode=mode, **arguments))  # type: ignore[arg-type]
    x = torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = Plan.trace(model, x)
    found = evaluate(plan.graph, {}, plan.constants, [x[None]])[0]
    torch.testing.assert_close(found, model(x).flatten(1), rtol=1e-13, atol=1e-13)
