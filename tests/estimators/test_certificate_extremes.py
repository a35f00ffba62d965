"""Error bounds where float64 ends: overflowing sums, denormal numbers, huge and tiny factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

import mpmath
import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.lower.quotients import differences, quotients
from lipfast.estimators.plan import Plan
from lipfast.ops.denormals import denormals_flushed
from lipfast.plan.elementwise_errors import quotient
from lipfast.plan.parameter_rules import Enclosure
from lipfast.plan.state import stack
from lipfast.rules.products import error_of_quotient


class Pointwise(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def enclosed(model: nn.Module, points: list[list[float]]) -> tuple[list[list[float]], Tensor]:
    """Outputs and error bounds of one network."""
    x = torch.tensor([points], dtype=torch.float64)
    plan = Plan.trace(model.double(), torch.zeros(2, x.shape[-1], dtype=torch.float64))
    parameters = stack([model.state_dict()], plan.used_parameters, torch.float64)
    outputs, errors = enclose(plan, parameters, x)
    return outputs[0].tolist(), errors[0]


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False).double()
    layer.weight.data.copy_(torch.tensor(weight, dtype=torch.float64))
    return layer


def test_a_partial_sum_that_overflows_proves_nothing() -> None:
    model = nn.Sequential(linear([[1e308, 1e308, -1e308, -1e308]]), nn.Hardtanh(-1e300, 1e300))
    outputs, errors = enclosed(model, [[1.5, 1.5, 1.5, 1.5]])  # in truth 0
    assert abs(outputs[0][0]) <= float(errors[0, 0]) or math.isnan(outputs[0][0])


def test_denormal_inputs_of_huge_weights() -> None:
    weight = [1.3e308, -1.1e308, 1.7e307]
    points = [[k * 1.7e-311, k * 1e-312, k * 3e-312] for k in (1.0, 1.3, 1.9, 7.7)]
    outputs, errors = enclosed(linear([weight]), points)
    for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
        truth = sum(Fraction(w) * Fraction(x) for w, x in zip(weight, point, strict=True))
        assert abs(Fraction(output[0]) - truth) <= Fraction(error[0])
        assert error[0] < 1e-11 * abs(output[0])


@pytest.mark.parametrize(
    ("function", "truth"),
    [
        (partial(nn.functional.leaky_relu, negative_slope=0.6), lambda x: x * Fraction(0.6)),
        (nn.functional.softsign, lambda x: x / (1 + abs(x))),
        (nn.functional.hardswish, lambda x: x * (x + 3) / 6),
        (lambda x: x / 1.7e308, lambda x: x / Fraction(1.7e308)),
    ],
    ids=["leaky_relu", "softsign", "hardswish", "division"],
)
def test_roundings_that_underflow(
    function: Callable[[Tensor], Tensor], truth: Callable[[Fraction], Fraction]
) -> None:
    points = [[-5e-324], [-3.5e-323], [-1e-310], [-0.3]]
    outputs, errors = enclosed(Pointwise(function), points)
    for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
        assert abs(Fraction(output[0]) - truth(Fraction(point[0]))) <= Fraction(error[0])


class Cancelling(nn.Module):
    """``p + alpha x``."""

    def __init__(self, p: float, alpha: float) -> None:
        super().__init__()
        self.p, self.alpha = nn.Parameter(torch.full((1,), p, dtype=torch.float64)), alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.p, x, alpha=self.alpha)


def test_a_tiny_alpha_keeps_the_rounding_of_the_product() -> None:
    alpha, x = 1e-320, 1.1e300
    outputs, errors = enclosed(Cancelling(-(alpha * x), alpha), [[x]])
    truth = Fraction(alpha) * Fraction(x) - Fraction(alpha * x)
    assert truth != 0 == outputs[0][0]
    assert abs(truth) <= Fraction(float(errors[0, 0])) < 1e-15 * (alpha * x)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_a_denormal_quotient_is_not_claimed(norm: float) -> None:
    points = torch.tensor([[[0.0], [1.7e300]]], dtype=torch.float64)
    outputs = torch.tensor([[[0.0], [3.0e-20]]], dtype=torch.float64)
    pairs = (torch.tensor([0]), torch.tensor([1]))
    value = quotients(
        *differences(points, outputs, pairs, norm), torch.zeros_like(outputs), pairs, norm
    )
    assert Fraction(float(value)) * Fraction(1.7e300) <= Fraction(3.0e-20)


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.usefixtures("flushing")
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_nothing_is_certified_while_denormals_are_flushed(norm: float) -> None:
    assert denormals_flushed()
    model = nn.Sequential(nn.Linear(2, 2), nn.PReLU(init=1e-40), nn.Linear(2, 1))
    bounds = lipfast.bounds(model, torch.randn(3, 2), norm=norm)
    for bound in (bounds.lower, bounds.upper):
        assert not bound.certified
        assert bound.reason is not None and "denormal" in bound.reason
    sums = lipfast.spectral_norms([torch.full((3, 3), 1e-310, dtype=torch.float64)], norm=1)
    assert not bool(sums.certified[0])


@pytest.mark.parametrize("weight", [2.0**-1074, 3e-323, 1.5e-310])
def test_a_denormal_scale_of_batch_norm(weight: float) -> None:
    norm = nn.BatchNorm1d(1, eps=0.0).double().eval()
    norm.weight.data.fill_(weight)
    norm.running_var.fill_(9.0)
    model = nn.Sequential(nn.ReLU(), norm, nn.ReLU(), linear([[1e200]])).eval()
    points = [[1.0], [1e150], [1e300]]
    outputs, errors = enclosed(model, points)
    for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
        truth = Fraction(point[0]) * Fraction(weight) / 3 * Fraction(1e200)
        assert abs(Fraction(output[0]) - truth) <= Fraction(error[0])


@pytest.mark.parametrize("eps", [2.0**-1074, 1e-320, 1e-300])
@pytest.mark.parametrize("size", [1e-161, 1e-162, 3e-323])
def test_squares_that_underflow_beside_the_eps_of_a_layer_norm(eps: float, size: float) -> None:
    points = [[size, 0.0], [3 * size, -size], [7 * size, 0.0], [size, 0.3 * size]]
    outputs, errors = enclosed(nn.LayerNorm(2, eps=eps, elementwise_affine=False), points)
    for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
        half = (mpmath.mpf(point[0]) - mpmath.mpf(point[1])) / 2
        truth = half / mpmath.sqrt(half**2 + mpmath.mpf(eps))
        assert abs(mpmath.mpf(output[0]) - truth) <= error[0]
        assert abs(mpmath.mpf(output[1]) + truth) <= error[1]


def test_products_of_denormal_and_huge_matrices() -> None:
    def product(x: Tensor) -> Tensor:
        return (x[:, :3].unsqueeze(1) @ x[:, 3:].unsqueeze(2)).flatten(1)

    factors = (1.3e308, -1.1e308, 1.7e307)
    points = [[k * 1.7e-311, k * 1e-312, k * 3e-312, *factors] for k in (1.0, 1.3, 1.9, 7.7)]
    outputs, errors = enclosed(Pointwise(product), points)
    for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
        pairs = zip(point[:3], factors, strict=True)
        truth = sum(Fraction(a) * Fraction(b) for a, b in pairs)
        assert abs(Fraction(output[0]) - truth) <= Fraction(error[0])


@pytest.mark.parametrize("divisor", [3.0, 49.0, 0.1, -1.7e308, 1.1 * 2.0**1022])
def test_a_quotient_may_be_a_product_with_the_reciprocal(divisor: float) -> None:
    """What CUDA makes of a number that is divided by: the error holds for it as well."""
    generator = torch.Generator().manual_seed(0)
    scale = max(1.0, abs(divisor) / 2)
    points = torch.rand(500, 1, generator=generator, dtype=torch.float64) * scale
    _, errors = enclosed(Pointwise(lambda x: x / divisor), points.tolist())
    for point, error in zip(points.flatten().tolist(), errors.flatten().tolist(), strict=True):
        truth = Fraction(point) / Fraction(divisor)
        assert abs(Fraction(point * (1.0 / divisor)) - truth) <= Fraction(error)
        assert error <= 1e-15 * float(abs(truth)) + 1e-15


@pytest.mark.parametrize("norm", [1, math.inf])
def test_huge_kernels_while_torch_makes_half_precision_by_default(norm: float) -> None:
    """The power of two that keeps their sums from overflowing is none of float16's numbers."""
    kernel = nn.Conv1d(1, 1, 2, bias=False).double()
    kernel.weight.data.copy_(torch.tensor([[[1e308, 0.5e308]]], dtype=torch.float64))
    plan = Plan.trace(kernel, torch.zeros(2, 1, 5, dtype=torch.float64))
    torch.set_default_dtype(torch.float16)
    try:
        found = plan.upper(dict(kernel.state_dict()), norm=norm)
    finally:
        torch.set_default_dtype(torch.float32)
    assert 1.5e308 <= found.value <= 1.5e308 * (1 + 1e-12)


def test_a_huge_scale_of_batch_norm() -> None:
    """Times the rounding of a denormal number, which underflows."""
    norm = nn.BatchNorm1d(1, eps=0.0, affine=False).double().eval()
    points = [[k * 1e-312] for k in range(1, 40)]
    for variance in (3e-300, 7e-290, 1.1e-310):
        norm.running_var.fill_(variance)
        outputs, errors = enclosed(nn.Sequential(nn.ReLU(), norm).eval(), points)
        for point, output, error in zip(points, outputs, errors.tolist(), strict=True):
            truth = mpmath.mpf(point[0]) / mpmath.sqrt(mpmath.mpf(variance))
            assert abs(mpmath.mpf(output[0]) - truth) <= error[0]


@pytest.mark.parametrize("size", [1e-115, 1e-170, 1e-250])
def test_errors_of_tiny_divisors(size: float) -> None:
    """A tiny quotient times the divisor's error underflows, and is divided by the divisor."""
    x, y = torch.tensor([1.7e-313], dtype=torch.float64), torch.tensor([1.3, 2.9, 7.1]).double()
    y, e = y * size, y * size * 1e-12
    z = x / y
    exact = torch.zeros_like(x)
    errors = quotient(Enclosure(x), Enclosure(y, e)).radius, error_of_quotient(y, [exact, e], z)
    for found in errors:
        for divisor, off, value, error in zip(*(t.tolist() for t in (y, e, z, found)), strict=True):
            for truth in (Fraction(divisor) - Fraction(off), Fraction(divisor) + Fraction(off)):
                assert abs(Fraction(value) - Fraction(float(x)) / truth) <= Fraction(error)
