"""The kernels of certified secants, run on the CPU: points against the reference, quotients exact.

And the kernel that stacks tensors, which brings networks together for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.reference import chain_secants as reference
from tests.csrc.test_kernels import DTYPES, normal, same_under_every_order
from tests.support import kernels
from tests.support.harness import Harness

RELU, INF = Activation("relu"), math.inf
CASES: dict[str, tuple[tuple[int, ...], list[Stage]]] = {
    "one map": ((3, 2), [Linear()]),
    "numbers": ((1, 1, 1), [Linear(), RELU, Linear()]),
    "more inputs": ((21, 4, 2), [Linear(), RELU, Linear()]),
    "wide": ((5, 33, 3), [Linear(), RELU, Linear()]),
    "more outputs": ((4, 17, 9), [Linear(), Activation("leaky_relu", (-0.3,)), Linear()]),
    "clipped": (
        (6, 19, 7, 4),
        [
            *[Linear(), Activation("relu6"), Linear(), Activation("hardtanh", (-0.6, 0.5))],
            *[RELU, Linear()],
        ],
    ),
    "activations first and last": (
        (7, 5, 2),
        [Activation("leaky_relu", (0.5,)), RELU, Linear(), RELU, Linear(), Activation("relu6")],
    ),
}
Networks = tuple[list[list[Tensor]], list[list[Tensor | None]]]


def networks_of(dims: Sequence[int], dtype: torch.dtype, count: int = 3) -> Networks:
    weights = [
        [normal(b, a, seed=5 * n + a, dtype=dtype) / math.sqrt(a) for a, b in pairwise(dims)]
        for n in range(count)
    ]
    biases: list[list[Tensor | None]] = [
        [normal(b, seed=n + b, dtype=dtype).abs() if index % 2 == 0 else None
         for index, b in enumerate(dims[1:])]
        for n in range(count)
    ]  # fmt: skip
    return weights, biases


def exact(values: Sequence[Fraction], weights: list[Tensor], biases: list, stages: list) -> list:
    """What a network makes of a point, in rational arithmetic."""
    affine = zip(weights, biases, strict=True)
    for stage in stages:
        if isinstance(stage, Linear):
            weight, bias = next(affine)
            rows = [[Fraction(w) for w in row] for row in weight.tolist()]
            shifts = [0.0] * len(rows) if bias is None else bias.tolist()
            values = [
                sum((w * v for w, v in zip(row, values, strict=True)), Fraction(shift))
                for row, shift in zip(rows, shifts, strict=True)
            ]
        elif stage.name == "leaky_relu":
            values = [v if v > 0 else v * Fraction(stage.parameters[0]) for v in values]
        else:
            low, high = stage.parameters if stage.name == "hardtanh" else (0.0, None)
            high = 6.0 if stage.name == "relu6" else high
            values = [max(v, Fraction(low)) for v in values]
            values = values if high is None else [min(v, Fraction(high)) for v in values]
    return list(values)


def size(values: list[Fraction], norm: float) -> Fraction:
    """The norm of a vector; its square for norm 2."""
    if norm == 2:
        return sum((v * v for v in values), Fraction(0))
    sizes = [abs(v) for v in values]
    return sum(sizes, Fraction(0)) if norm == 1 else max(sizes)


def check_exactly(
    found: kernels.Secants, networks: Networks, stages: list, norm: float, loss: float = 1e-9
) -> None:
    """Quotients are not above those of their stored points in real arithmetic, nor far below."""
    weights, biases = networks
    for n, (value, (a, b)) in enumerate(zip(found.values.tolist(), found.ends, strict=True)):
        ends = [[Fraction(v) for v in end.tolist()] for end in (a, b)]
        one, other = (exact(end, weights[n], biases[n], stages) for end in ends)
        moved = size([p - q for p, q in zip(one, other, strict=True)], norm)
        apart = size([p - q for p, q in zip(*ends, strict=True)], norm)
        known = Fraction(value) ** (2 if norm == 2 else 1)
        assert 0 <= known * apart <= moved
        assert known * apart >= moved * Fraction(1 - loss)


def best_quotients(points: Tensor, networks: Networks, stages: list, norm: float) -> Tensor:
    """Of all pairs of a step, in float64: what the best of them may give."""
    values, _ = reference.enclosures(points, *networks, stages)
    down, up, middle = slice(1, None, 2), slice(2, None, 2), slice(0, 1)
    ratios = [
        torch.linalg.vector_norm(values[:, a] - values[:, b], norm, 2)
        / torch.linalg.vector_norm(points[:, a] - points[:, b], norm, 2)
        for a, b in ((down, up), (middle, up), (down, middle))
    ]
    return torch.cat(ratios, 1).nan_to_num(0.0).amax(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_secants_of_chains(checked: Harness, name: str, dtype: torch.dtype) -> None:
    dims, stages = CASES[name]
    networks = networks_of(dims, dtype)
    x = normal(3, dims[0], seed=2)

    def run(order: int) -> tuple[Tensor, ...]:
        found = kernels.chain_secants(checked, x, *networks, stages, seed=order)
        return astuple(found)

    found = kernels.Secants(*same_under_every_order(run))
    assert torch.equal(found.points[:, 0], x) and not found.loose.any()
    check_exactly(found, networks, stages, 2)
    best = best_quotients(found.points, networks, stages, 2)
    torch.testing.assert_close(found.values, best, rtol=1e-11, atol=0)


@pytest.mark.parametrize("norm", [1, 2, INF])
@pytest.mark.parametrize("name", ["wide", "more outputs", "clipped"])
def test_points_lie_where_the_jacobian_stretches_most(
    checked: Harness, name: str, norm: float
) -> None:
    dims, stages = CASES[name]
    networks = networks_of(dims, torch.float64)
    x = normal(3, dims[0], seed=2)
    found = kernels.chain_secants(checked, x, *networks, stages, norm=norm, grid=3)
    check_exactly(found, networks, stages, norm)
    jacobians = reference.jacobians(x, *networks, stages)
    scale = x.abs().amax(1, keepdim=True)
    direction = (found.points[:, 6] - x) / scale  # the step of length 1
    if norm == 2:
        stretched = (jacobians @ direction[:, :, None]).norm(dim=1)[:, 0]
        torch.testing.assert_close(direction.norm(dim=1), torch.ones(3).double())
        truth = torch.linalg.matrix_norm(jacobians, 2)
    else:
        stretched = torch.linalg.vector_norm(jacobians @ direction[:, :, None], norm, (1, 2))
        truth = torch.linalg.matrix_norm(jacobians, norm)
    torch.testing.assert_close(stretched, truth)
    back, forth = reference.kink_distances(x, direction, *networks, stages)
    for index, reach, sign in ((1, back, -1), (2, forth, 1)):
        steps = sign * 0.99 * torch.minimum(reach, 100 * scale[:, 0])
        torch.testing.assert_close(found.points[:, index], x + steps[:, None] * direction)


def test_secants_depend_neither_on_tables_nor_on_the_grid(checked: Harness) -> None:
    dims, stages = CASES["clipped"]
    for dtype in DTYPES:
        networks, x = networks_of(dims, dtype), normal(3, dims[0], seed=2)
        listed = kernels.chain_secants(checked, x, *networks, stages)
        for spaced, grid in ((True, 1), (False, 3)):
            other = kernels.chain_secants(checked, x, *networks, stages, spaced=spaced, grid=grid)
            for one, two in zip(astuple(listed), astuple(other), strict=True):
                assert torch.equal(one, two)
        alone = [[entry[1]] for entry in networks]
        one = kernels.chain_secants(checked, x[1:2], *alone, stages)
        assert torch.equal(one.values[0], listed.values[1])


def test_what_cannot_be_proved(checked: Harness) -> None:
    """Zeros, kinks under the sample, overflows, NaN: 0 where there is nothing, never more."""
    stages = [Linear(), RELU, Linear()]
    eye, x = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 2.0]] * 5).double()
    firsts = [eye * 0, eye, eye * 1e200, eye, eye]
    seconds = [eye, eye, eye * 1e200, eye * math.nan, eye]
    x[1], x[4, 0] = 0.0, math.nan
    networks: Networks = (
        [list(pair) for pair in zip(firsts, seconds, strict=True)],
        [[None, None]] * 5,
    )
    found = kernels.chain_secants(checked, x, *networks, stages)
    assert found.values[[0, 2, 3, 4]].tolist() == [0.0] * 4
    assert 1 - 1e-12 < float(found.values[1]) <= 1
    points = torch.zeros(5, 3, 2, dtype=torch.float64)  # that coincide
    found = kernels.chain_secants(checked, points, *networks, stages, fractions=(), ladder=(1.0,))
    assert found.values.tolist() == [0.0] * 5


EXTREMES = [1e-100, 1e-140, 2.0**-530, 1e100, 1e140, 2.0**500]


@pytest.mark.parametrize("scale", EXTREMES)
def test_extreme_weights_and_samples(checked: Harness, scale: float) -> None:
    """Squares that underflow or overflow, denormal products: never above the truth."""
    dims, stages = CASES["clipped"]
    weights, biases = networks_of(dims, torch.float64, 4)
    for n, index in enumerate((0, 1, 2, 0)):
        weights[n][index] *= scale
    weights[3][1] /= scale
    networks, x = (weights, biases), normal(4, dims[0], seed=3)
    x[0] *= scale
    for norm in (1, 2, INF):
        found = kernels.chain_secants(checked, x, *networks, stages, norm=norm)
        check_exactly(found, networks, stages, norm, loss=1.0)


@pytest.mark.long
def test_many_small_networks_exactly(checked: Harness) -> None:
    """Weights of few bits lie on kinks and cancel: quotients are exact, or below."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        dims = torch.randint(1, 5, (4,), generator=generator).tolist()
        draws = [
            [torch.randint(-2, 3, (b, a), generator=generator).float() for a, b in pairwise(dims)]
            for _ in range(8)
        ]
        shifts: list[list[Tensor | None]] = [[None] * 3 for _ in draws]
        stages = [Linear(), RELU, Linear(), Activation("leaky_relu", (0.1,)), Linear()]
        x = torch.randint(-1, 2, (8, dims[0]), generator=generator).double()
        for norm in (1, 2, INF):
            found = kernels.chain_secants(checked, x, draws, shifts, stages, norm=norm)
            check_exactly(found, (draws, shifts), stages, norm, loss=1e-8)


def test_deep_networks_are_loose(checked: Harness) -> None:
    """Elementwise bounds grow faster than the values: little is left, and that is said."""
    depth, width = 24, 12
    signs = torch.where(normal(width, width) > 0, 1.0, -1.0).double()
    weight = torch.linalg.qr(signs)[0] * 1.5
    stages = [Linear(), Activation("leaky_relu", (0.9,))] * depth
    x, ladder = normal(1, width, seed=2), (1e-4, 1e-6)
    networks: Networks = ([[weight] * depth], [[None] * depth])
    found = kernels.chain_secants(checked, x, *networks, stages, fractions=(), ladder=ladder)
    best = float(best_quotients(found.points, networks, stages, 2))
    assert found.loose.tolist() == [float(float(found.values) < 0.99 * best)] == [1.0]
    assert 0 <= float(found.values) < 0.99 * best


@pytest.mark.long
def test_large_secants(checked: Harness) -> None:
    """Two panels of rows, and the Gram matrix of the inputs' side."""
    for dims in [(40, 150, 10), (20, 140, 66)]:
        stages = [Linear(), RELU, Linear()]
        networks, x = networks_of(dims, torch.float32, 1), normal(1, dims[0], seed=2)
        found = kernels.chain_secants(checked, x, *networks, stages)
        check_exactly(found, networks, stages, 2)
        truth = torch.linalg.matrix_norm(reference.jacobians(x, *networks, stages), 2)
        assert float(found.values) >= float(truth) * (1 - 1e-9)


def test_sanitizers_find_nothing_in_secants(sanitized: Harness) -> None:
    for name, norm in (("clipped", 2), ("more outputs", 2), ("activations first and last", 1)):
        dims, stages = CASES[name]
        networks, x = networks_of(dims, torch.float32), normal(3, dims[0])
        kernels.chain_secants(sanitized, x, *networks, stages, norm=norm, spaced=norm == 1)


PLACES = {"16 bytes": (64, 48), "4 bytes": (4, 20), "bytes": (1, 7), "one": (16, 5)}


@pytest.mark.parametrize("name", PLACES)
def test_stack(checked: Harness, plain: Harness, sanitized: Harness, name: str) -> None:
    unit, length = PLACES[name]
    places = [unit * place for place in (7, 0, 3, 3, 12)] if name != "one" else [0]
    values = torch.arange(max(places) + length).to(torch.uint8)
    expected = torch.stack([values[place : place + length] for place in places])
    # Four bytes are one to the search for races.
    for harness in (checked if length % 4 == 0 else plain, sanitized):
        assert torch.equal(kernels.stack(harness, values, places, length, unit), expected)
