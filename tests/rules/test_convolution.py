"""Convolutions: brackets against the explicit matrix, errors, chains of them."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lipfast.estimators.plan import Plan
from tests.support.explicit import NORMS, check_linear, matrix_of

LAYERS = {
    "plain": (nn.Conv2d(2, 3, 3), (2, 5, 6)),
    "one axis": (nn.Conv1d(3, 2, 4, padding=2, stride=3), (3, 7)),
    "three axes": (nn.Conv3d(2, 2, 2, padding=1), (2, 3, 3, 2)),
    "same, even kernel": (nn.Conv2d(2, 2, 4, padding="same", dilation=(1, 2)), (2, 5, 6)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 4, 5)),
    "stride beyond the kernel": (nn.Conv2d(2, 3, 2, stride=3), (2, 7, 8)),
    "transposed": (nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1), (3, 4, 3)),
    "transposed, grouped": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (4, 5)),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 5)),
    "reflect": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
    "replicate": (nn.Conv1d(2, 2, 5, padding=2, padding_mode="replicate"), (2, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bound_against_the_explicit_matrix(name: str) -> None:
    layer, shape = LAYERS[name]
    padded = name in ("circular", "reflect", "replicate")
    # Sums of magnitudes are exact; the norm 2 may be loose, and padding and kernel are two factors.
    check_linear(layer, shape, slack=(6.0, 6.0, 6.0) if padded else (1.0, 6.0, 1.0))


@settings(max_examples=12)
@given(st.data())
def test_brackets_hold_the_truth(data: st.DataObject) -> None:
    draw = data.draw
    axes = draw(st.integers(1, 2))
    groups = draw(st.sampled_from([1, 1, 2]))
    transposed = draw(st.booleans())
    kind = {
        (1, False): nn.Conv1d,
        (2, False): nn.Conv2d,
        (1, True): nn.ConvTranspose1d,
        (2, True): nn.ConvTranspose2d,
    }[axes, transposed]

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, padding, dilation = numbers(1, 4), numbers(1, 3), numbers(0, 2), numbers(1, 2)
    torch.manual_seed(draw(st.integers(0, 9)))
    layer = kind(2 * groups, 3 * groups, kernel, stride, padding, dilation=dilation, groups=groups)
    layer = layer.double()
    reach = max(step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True))
    shape = (2 * groups, *numbers(reach, reach + 2))
    try:
        matrix = matrix_of(layer, shape)
    except RuntimeError:  # nothing is left of the sample: torch refuses it as well
        return
    plan = Plan.trace(layer, torch.zeros(2, *shape, dtype=torch.float64))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        (bracket,) = plan.upper(layer.state_dict(), norm=norm).layers
        assert bracket.lower * (1 - 1e-14) <= truth <= bracket.upper * (1 + 1e-14)


@pytest.mark.parametrize("scale", [1e-180, 1e-30, 1e30, 1e150])
def test_extreme_kernels(scale: float) -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    with torch.no_grad():
        layer.weight.mul_(scale)
    plan = Plan.trace(layer, torch.zeros(2, 2, 4, 4).double())
    truth = float(torch.linalg.matrix_norm(matrix_of(layer, (2, 4, 4)) / scale, 2))
    (bracket,) = plan.upper(layer.state_dict()).layers
    assert 0 < bracket.lower / scale <= truth <= bracket.upper / scale < math.inf


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [1, 5])
def test_sums_beyond_float64_have_a_finite_lower_end(
    norm: float, transposed: bool, size: int
) -> None:
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    layer = kind(2, 2, 3, padding=1, bias=False).double()
    with torch.no_grad():
        entries = 1 + torch.arange(12, dtype=torch.float64).reshape(2, 2, 3) / 24
        layer.weight.copy_(entries * 2.0**-900)
    matrix = matrix_of(layer, (2, size)).abs()
    truth = Fraction(float(torch.linalg.matrix_norm(matrix, norm))) * 2**1923
    with torch.no_grad():
        layer.weight.mul_(2.0**1000).mul_(2.0**923)
    plan = Plan.trace(layer, torch.zeros(2, 2, size).double())
    (bracket,) = plan.upper(layer.state_dict(), norm=norm).layers
    assert bracket.certified
    assert bracket.upper == math.inf
    assert 2.0**1022 < Fraction(bracket.lower) <= truth


def test_convolutions_of_several_networks_in_one_call() -> None:
    layers = []
    for seed in range(3):
        torch.manual_seed(seed)
        layers.append(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 2)))
    plan = Plan.trace(layers[0], torch.zeros(2, 1, 5, 5))
    together = plan.upper([layer.state_dict() for layer in layers])
    assert together == [plan.upper(layer.state_dict()) for layer in layers]
    assert all(a != b for a, b in itertools.pairwise(together))


def test_computed_kernels_are_refused_with_a_reason() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight * x.mean())

    with pytest.raises(NotImplementedError, match="weight"):
        Plan.trace(Doubled(1, 1, 1), torch.zeros(2, 1, 3, 3))
