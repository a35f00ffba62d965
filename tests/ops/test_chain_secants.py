"""Secants of piecewise-linear chains: like the reference; errors hold in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import chain

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.chain_secants import PiecewiseLinearChains, encode_secant_chain, has_secant_kernel
from lipfast.ops.chain_stages import Activation, Flatten, Linear, Stage
from lipfast.reference import chain_secants as reference
from tests.support.chain_cases import RELU, Biases, Weights, draw, mlp, mlp_shapes

LEAKY = Activation("leaky_relu", (0.2,))
ACTIVATIONS = [
    RELU,
    LEAKY,
    Activation("leaky_relu", (-2.0,)),
    Activation("relu6"),
    Activation("hardtanh", (-0.5, 0.75)),
]
# Widths below, at and beside those of vectors; K > D, D > K; depths 1 to 4.
DIMS = [
    *((1, 1), (3, 2), (7, 1, 5), (13, 29, 10), (5, 17, 33, 21)),
    *((40, 24, 8, 16, 3), (3, 9, 11, 50)),
]


def points_of(networks: int, count: int, size: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(networks, count, size, dtype=torch.float64, generator=generator)


def assert_like_reference(weights: Weights, biases: Biases, stages: list[Stage]) -> None:
    chains = PiecewiseLinearChains(weights, biases, stages)
    networks, size = len(weights), weights[0][0].shape[1]
    x, direction = points_of(networks, 2, size).unbind(1)
    problem = (weights, biases, stages)
    close = torch.testing.assert_close
    close(chains.jacobians(x), reference.jacobians(x, *problem), rtol=1e-11, atol=1e-13)
    reach = chains.kink_distances(x, direction)
    for found, expected in zip(
        reach, reference.kink_distances(x, direction, *problem), strict=True
    ):
        close(found, expected, rtol=1e-9, atol=1e-12)
    for count in (1, 8, 19, 25):
        points = points_of(networks, count, size)
        values, errors = chains.enclosures(points)
        expected_values, expected_errors = reference.enclosures(points, *problem)
        assert ((values - expected_values).abs() <= errors + expected_errors).all()
        close(errors, expected_errors, rtol=1e-9, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_matches_the_reference(
    capability: str, dims: tuple[int, ...], dtype: torch.dtype, *, bias: bool
) -> None:
    weights, biases = draw(mlp_shapes(dims), dtype, networks=3, bias=bias)
    for activation in ACTIVATIONS:
        assert_like_reference(weights, biases, mlp(dims, activation))
    assert_like_reference(weights, biases, [LEAKY, *mlp(dims, RELU, LEAKY), RELU])


def test_kinks_are_autograds(capability: str) -> None:
    """Derivatives at the kinks themselves: 0 for clipping, the slope for LeakyReLU."""
    x = torch.tensor([[0.0], [6.0], [-1.0], [1.0], [0.5]])
    for activation, expected in (
        (RELU, [0, 1, 0, 1, 1]),
        (LEAKY, [0.2, 1, 0.2, 1, 1]),
        (Activation("relu6"), [0, 0, 0, 1, 1]),
        (Activation("hardtanh", (-1.0, 1.0)), [1, 0, 0, 0, 1]),
    ):
        weights = [[torch.ones(1, 1, dtype=torch.float64)]] * len(x)
        chains = PiecewiseLinearChains(weights, [[None]] * len(x), [Linear(), activation])
        assert chains.jacobians(x).flatten().tolist() == expected


def test_distances_to_both_sides(capability: str) -> None:
    weights = [[torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]])]]
    biases = [[torch.tensor([1.0, 6.0, 0.0])]]
    for activation, expected in (
        (RELU, (2.0, 2.0)),
        (Activation("relu6"), (1.0, 2.0)),
        (Activation("hardtanh", (-9.0, 2.5)), (11.0, 0.5)),
    ):
        chains = PiecewiseLinearChains(weights, biases, [Linear(), activation])
        x, direction = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0]])
        backward, forward = chains.kink_distances(x, direction)
        assert (float(backward), float(forward)) == expected
        still = chains.kink_distances(x, torch.tensor([[0.0, 1.0]]))
        assert [float(side) for side in still] == [math.inf, math.inf]


def test_results_do_not_depend_on_threads_or_on_the_other_networks(capability: str) -> None:
    dims = (20, 33, 9)
    weights, biases = draw(mlp_shapes(dims), torch.float32, networks=7)
    points = points_of(7, 19, 20)
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(PiecewiseLinearChains(weights, biases, mlp(dims, RELU)).enclosures(points))
    finally:
        torch.set_num_threads(before)
    one = PiecewiseLinearChains(weights[4:5], biases[4:5], mlp(dims, RELU))
    alone = one.enclosures(points[4:5])
    for side in range(2):
        assert torch.equal(found[0][side], found[1][side])
        assert torch.equal(found[0][side][4:5], alone[side])


def test_other_layouts_and_dtypes(capability: str) -> None:
    """Transposed views, halves, and weights of two dtypes: all become float64 exactly."""
    dims = (12, 10, 3)
    weights, biases = draw(mlp_shapes(dims), torch.float64)
    stages: list[Stage] = [Flatten(), *mlp(dims, RELU)]
    half = [[weight.half() for weight in network] for network in weights]
    mixed = [[network[0].half(), network[1].half().double()] for network in weights]
    views = [[weight.mT.contiguous().mT for weight in network] for network in half]
    bias = [[entry.half() if entry is not None else None for entry in own] for own in biases]
    points = points_of(len(weights), 5, 12)
    expected = PiecewiseLinearChains(half, bias, stages).enclosures(points)
    for given in (mixed, views):
        chains = PiecewiseLinearChains(given, bias, stages)
        values, errors = chains.enclosures(points.reshape(len(weights), 5, 3, 4))
        assert torch.equal(values, expected[0])
        assert torch.equal(errors, expected[1])


# The truth in rational arithmetic.


def exact(
    point: Sequence[float], weights: list[Tensor], biases: list[Tensor | None], stages: list[Stage]
) -> list[Fraction]:
    values = [Fraction(entry) for entry in point]
    affine = zip(weights, biases, strict=True)
    for stage in stages:
        if isinstance(stage, Linear):
            weight, bias = next(affine)
            rows = [[Fraction(w) for w in row] for row in weight.double().tolist()]
            shift = [0.0] * len(rows) if bias is None else bias.double().tolist()
            values = [
                sum((w * v for w, v in zip(row, values, strict=True)), Fraction(b))
                for row, b in zip(rows, shift, strict=True)
            ]
        elif isinstance(stage, Activation):
            values = [exact_activation(stage, value) for value in values]
    return values


def exact_activation(stage: Activation, value: Fraction) -> Fraction:
    if stage.name == "leaky_relu":
        return value if value > 0 else value * Fraction(stage.parameters[0])
    if stage.name == "relu":
        return max(value, Fraction(0))
    low, high = (0.0, 6.0) if stage.name == "relu6" else stage.parameters
    return min(max(value, Fraction(low)), Fraction(high))


def assert_proved(
    points: Tensor, weights: Weights, biases: Biases, stages: list[Stage]
) -> tuple[Tensor, Tensor]:
    """Every error bound of every network, without tolerance."""
    values, errors = PiecewiseLinearChains(weights, biases, stages).enclosures(points)
    assert not errors.isnan().any()
    for network, own in enumerate(points.tolist()):
        for index, point in enumerate(own):
            truth = exact(point, weights[network], biases[network], stages)
            for value, error, true in zip(
                values[network, index].tolist(),
                errors[network, index].tolist(),
                truth,
                strict=True,
            ):
                if error == math.inf:
                    continue
                assert math.isfinite(value)
                assert abs(Fraction(value) - true) <= Fraction(error)
    return values, errors


SCALES = [1.0, 1e-8, 1e12, 1e-150, 1e150, 1e-310, 5e-324, 1e300]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_errors_hold_in_exact_arithmetic(
    capability: str, seed: int, activation: Activation
) -> None:
    """Small networks whose layers, biases and points have scales from denormal to huge."""
    generator = torch.Generator().manual_seed(seed)
    dims = [(3, 5, 2), (2, 4, 3, 2), (5, 3), (1, 2, 1)][seed % 4]

    def entries(*shape: int) -> Tensor:
        scale = SCALES[int(torch.randint(len(SCALES), (), generator=generator))]
        drawn = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return drawn * (torch.rand(*shape, generator=generator) > 0.2)

    networks = 24
    weights = [[entries(*shape) for shape in mlp_shapes(dims)] for _ in range(networks)]
    biases: Biases = [
        [entries(shape[0]) if network % 3 else None for shape in mlp_shapes(dims)]
        for network in range(networks)
    ]
    points = torch.stack([entries(3, dims[0]) for _ in range(networks)])
    _, errors = assert_proved(points, weights, biases, mlp(dims, activation, activation))
    assert torch.isfinite(errors).any()


@pytest.mark.parametrize("dims", [(40, 17, 5), (9, 31, 12, 3)], ids=str)
def test_errors_of_ordinary_networks_are_small_and_hold(
    capability: str, dims: tuple[int, ...]
) -> None:
    weights, biases = draw(mlp_shapes(dims), torch.float32, networks=2)
    _, errors = assert_proved(points_of(2, 3, dims[0]), weights, biases, mlp(dims, LEAKY))
    assert errors.max() < 1e-12


def test_errors_hold_where_sums_cancel(capability: str) -> None:
    """Hundreds of terms of size 1 that add up to something far smaller."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, 150, dtype=torch.float64, generator=generator)
    weight = torch.cat([half, -half * (1 + 2.0**-50)], 1)
    points = points_of(1, 9, 150).repeat(1, 1, 2)
    stages: list[Stage] = [Linear(), RELU, Linear()]
    assert_proved(points, [[weight, torch.full((1, 4), 1e15)]], [[None, None]], stages)


def test_zero_layers_have_no_errors_but_room_for_underflow(capability: str) -> None:
    weights = [[torch.zeros(6, 3), torch.zeros(2, 6)]]
    values, errors = PiecewiseLinearChains(
        weights, [[None, None]], [Linear(), RELU, Linear()]
    ).enclosures(points_of(1, 4, 3))
    assert not values.any()
    assert (errors == 2.0**-1000).all()


def test_an_overflow_proves_nothing(capability: str) -> None:
    """Also where what follows would hide it: the truth of the clipped sum is 0."""
    weights = [[torch.tensor([[1e308, 1e308, -1e308, -1e308]], dtype=torch.float64)]]
    point = torch.full((1, 1, 4), 1.5, dtype=torch.float64)
    for activation in (RELU, LEAKY, Activation("hardtanh", (-1e300, 1e300))):
        chains = PiecewiseLinearChains(weights, [[None]], [Linear(), activation])
        values, errors = chains.enclosures(point)
        assert errors.item() == math.inf or abs(values.item()) <= errors.item()
    # An infinite error meets a weight of 0.
    twice = [[*weights[0], torch.zeros(1, 1, dtype=torch.float64)]]
    chains = PiecewiseLinearChains(twice, [[None, None]], [Linear(), RELU, Linear()])
    assert chains.enclosures(point)[1].item() == math.inf
    # What is bounded stays bounded, whatever its operand is.
    capped = PiecewiseLinearChains(weights, [[None]], [Linear(), Activation("relu6")])
    value, error = capped.enclosures(torch.tensor([[[1.5, 1.5, 0.0, 0.0]]]))
    assert value.item() == 6.0
    assert error.item() == pytest.approx(12.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_prove_nothing(capability: str, bad: float) -> None:
    points = torch.tensor([[[1.0, bad], [1.0, 1.0]]], dtype=torch.float64)
    for first in ([], [RELU], [LEAKY]):
        chains = PiecewiseLinearChains(
            [[torch.ones(2, 2), torch.ones(3, 2)]],
            [[None, None]],
            [*first, Linear(), RELU, Linear()],
        )
        if bad == -math.inf and first:
            continue  # ReLU makes an exact 0 of it: only stored finite points are asked for
        errors = chains.enclosures(points)[1]
        assert (errors[0, 0] == math.inf).all()
        assert torch.isfinite(errors[0, 1]).all()


def test_denormals_are_kept_whatever_mode_the_caller_is_in(capability: str) -> None:
    weights = [[torch.tensor([[1.3e308, -1.1e308]], dtype=torch.float64)]]
    points = torch.tensor([[[1.7e-311, 1e-312], [3e-312, 5e-324]]], dtype=torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        values, errors = PiecewiseLinearChains(weights, [[None]], [Linear()]).enclosures(points)
    finally:
        torch.set_flush_denormal(False)
    for value, error, point in zip(
        values.flatten().tolist(), errors.flatten().tolist(), points[0].tolist(), strict=True
    ):
        (truth,) = exact(point, weights[0], [None], [Linear()])
        assert abs(Fraction(value) - truth) <= Fraction(error)
        assert value != 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck() -> None:
    dims = (6, 9, 4)
    weights, biases = draw(mlp_shapes(dims), torch.float32, networks=2)
    none = torch.empty(0)
    flat = [bias if bias is not None else none for bias in chain(*biases)]
    rest = (list(chain(*weights)), flat, *encode_secant_chain(mlp(dims, LEAKY)))
    points = points_of(2, 3, 6)
    ops = torch.ops.lipfast
    torch.library.opcheck(ops.chain_secants_jacobians.default, (points[:, 0].contiguous(), *rest))
    line = (points[:, 0].contiguous(), points[:, 1].contiguous())
    torch.library.opcheck(ops.chain_secants_kinks.default, (*line, *rest))
    torch.library.opcheck(ops.chain_secants_enclosures.default, (points, *rest))


def test_bad_input() -> None:
    first, last = torch.ones(5, 3), torch.ones(2, 5)
    stages: list[Stage] = [Linear(), RELU, Linear()]
    bad: list[tuple[list[list[Tensor]], list[list[Tensor | None]], list[Stage], str]] = [
        ([[first, last]], [[None, None]], [Linear(), Activation("tanh"), Linear()], "tanh"),
        ([[first, last]], [[None, None]], [RELU], "at least one Linear"),
        ([], [], stages, "0 networks"),
        ([[first, last]], [], stages, "1 networks' weights and 0"),
        ([[first]], [[None]], stages, "1 weights, 1 biases, 2 Linear"),
        ([[first, last], [first]], [[None, None]] * 2, stages, "network 1: 1 weights"),
        ([[first, last.mT]], [[None, None]], stages, "network 0, stage 2"),
        (
            [[first, last], [first, last[:1]]],
            [[None, None]] * 2,
            stages,
            r"network 1, stage 2: expected a weight \(2, 5\)",
        ),
        ([[first, last]], [[torch.ones(4), None]], stages, r"stage 0: expected a bias \(5,\)"),
        ([[first.long(), last]], [[None, None]], stages, "int64"),
        ([[first.to("meta"), last]], [[None, None]], stages, "meta"),
        ([[first, last]], [[None, None]], [Linear(), Activation("relu", (1.0,)), Linear()], "relu"),
    ]
    for weights, biases, given, message in bad:
        with pytest.raises(ArgumentError, match=message):
            PiecewiseLinearChains(weights, biases, given)
    chains = PiecewiseLinearChains([[first, last]], [[None, None]], stages)
    for x in (torch.ones(3), torch.ones(1, 4), torch.ones(2, 3), torch.ones(1, 3).long()):
        with pytest.raises(ArgumentError, match="x: "):
            chains.jacobians(x)
        with pytest.raises(ArgumentError, match="points: "):
            chains.enclosures(x)
    with pytest.raises(ArgumentError, match="direction: "):
        chains.kink_distances(torch.ones(1, 3), torch.ones(1, 2))


def test_the_op_checks_again() -> None:
    x, weights, biases = torch.ones(1, 3).double(), [torch.ones(5, 3)], [torch.empty(0)]
    jacobians = torch.ops.lipfast.chain_secants_jacobians
    assert jacobians(x, weights, biases, [-1, 0], [0.0] * 4).shape == (1, 5, 3)
    bad = [
        ((x.float(), weights, biases, [-1], [0.0] * 2), "float64"),
        ((x, weights, biases, [0], [0.0] * 2), "needs a linear stage"),
        ((x, weights, biases, [-1, 4], [0.0] * 4), "unknown activation 4"),
        ((x, weights, biases, [-1, 0], [0.0] * 2), "2 parameters for 2 stages"),
        ((x, weights * 2, biases, [-1], [0.0] * 2), "2 weights and 1 biases"),
        ((x, weights * 2, biases * 2, [-1], [0.0] * 2), "points of 1 networks, weights of 2"),
        ((x[:, :2].contiguous(), weights, biases, [-1], [0.0] * 2), "expected a weight n x 2"),
        ((x, weights, [torch.ones(4)], [-1], [0.0] * 2), "expected 5 values"),
        ((x, weights, [torch.ones(5).double()], [-1], [0.0] * 2), "another dtype"),
    ]
    for arguments, message in bad:
        with pytest.raises(RuntimeError, match=message):
            jacobians(*arguments)


def test_which_chains() -> None:
    assert has_secant_kernel([Flatten(), Linear()])
    assert not has_secant_kernel([Flatten(), RELU])
    assert not has_secant_kernel([Linear(), Activation("gelu")])
