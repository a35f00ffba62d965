"""Circular padding and the convolution behind it are one operator, bounded as one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from tests.support.explicit import NORMS, matrix_of


class Padded(nn.Module):
    """Padding in the forward, and a convolution."""

    def __init__(self, sides: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.sides, self.conv = sides, nn.Conv2d(2, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, self.sides, mode="circular"))


OPTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": 3, "padding": 2},  # more than the kernel reaches: some outputs come twice
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (5, 1), "padding": (2, 0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(8, 7), (4, 4), (2, 3)], ids=str)
def test_never_below_the_explicit_matrix(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Also where the kernel is longer than the input, and reads entries more than once."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 4, padding_mode="circular", **options).double()
    matrix = matrix_of(layer, (2, *size))
    plan = lipfast.compile(layer, torch.zeros(2, 2, *size, dtype=torch.float64))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        bound = plan.upper(layer.state_dict(), norm=norm)
        (bracket,) = bound.layers
        assert bracket.kind == "conv2d circular" and bound.certified
        assert bracket.lower * (1 - 1e-13) <= truth <= bound.value * (1 + 1e-13)
        fits = size == (8, 7) and options.get("stride", 1) == 1
        once = options["padding"] != 2 or "dilation" in options
        if fits and (norm != 2 or (once and "dilation" not in options)):
            assert bound.value <= truth * 1.002


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 2, 2, 0), (1, 1, 0, 0), (2, 1, 0, 1)], ids=str)
def test_padding_by_hand(sides: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    model = Padded(sides, kernel_size=3).double()
    matrix = matrix_of(model, (2, 6, 5))
    bound = lipfast.upper_bound(model, torch.zeros(2, 2, 6, 5, dtype=torch.float64))
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    assert bound.layers[0].kind == "conv2d circular"
    assert truth <= bound.value * (1 + 1e-13) and bound.value <= 1.6 * truth


def test_zeros_beside_circular_padding_are_two_operators() -> None:
    torch.manual_seed(2)
    model = Padded((1, 1, 0, 0), kernel_size=3, padding=(1, 0)).double()
    bound = lipfast.upper_bound(model, torch.zeros(2, 2, 6, 5, dtype=torch.float64))
    assert bound.layers[0].kind == "conv2d"
    assert bound.value >= float(torch.linalg.matrix_norm(matrix_of(model, (2, 6, 5)), 2))


def test_batch_norms_fold_and_maps_merge_as_without_padding() -> None:
    torch.manual_seed(3)
    circular = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
    norm = nn.BatchNorm2d(3)
    assert norm.running_var is not None
    norm.running_var.uniform_(0.1, 2.0)
    models = {
        "conv2d circular + batch norm": nn.Sequential(circular, norm),
        "conv2d circular, 2 merged": nn.Sequential(circular, nn.Conv2d(3, 2, 3)),
    }
    for kind, built in models.items():
        model = built.double().eval()
        matrix = matrix_of(model, (2, 6, 6))
        for p in NORMS:
            bound = lipfast.upper_bound(model, torch.zeros(2, 2, 6, 6, dtype=torch.float64), norm=p)
            truth = float(torch.linalg.matrix_norm(matrix, p))
            assert [layer.kind for layer in bound.layers] == [kind]
            assert truth <= bound.value * (1 + 1e-13) and bound.value <= 1.4 * truth


def test_what_is_read_elsewhere_keeps_its_padding() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            padded = functional.pad(x, (1, 1, 1, 1), mode="circular")
            return self.conv(padded) + padded[..., 1:-1, 1:-1]

    torch.manual_seed(4)
    model = Twice().double()
    truth = float(torch.linalg.matrix_norm(matrix_of(model, (1, 5, 5)), 2))
    bound = lipfast.upper_bound(model, torch.zeros(2, 1, 5, 5, dtype=torch.float64))
    assert truth <= bound.value < math.inf


def test_the_saved_plan_is_as_traced_and_trackers_go_on() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU())
    plan = lipfast.compile(model, torch.zeros(2, 2, 6, 6))
    assert [node.op for node in plan.graph.nodes] == [
        "input",
        "aten.pad",
        "aten.conv2d",
        "aten.relu",
    ]
    tracker, state = plan.tracker(), model.state_dict()
    first, again = tracker.upper(state), tracker.upper(state)
    assert first.value == pytest.approx(plan.upper(state).value, rel=1e-3)
    assert again.value == pytest.approx(first.value, rel=2e-3)
    both = lipfast.bounds(model, torch.randn(8, 2, 6, 6))
    assert both.lower.certified and both.lower.value <= both.upper.value
