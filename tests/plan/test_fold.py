"""Folding BatchNorm leaves the function, or its differences, as they are."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import NonFiniteError
from lipfast.estimators.plan import Plan
from lipfast.plan.fold import fold_batch_norm, folded_parameters
from lipfast.plan.interpret import evaluate
from tests.support.networks import convolutional, randomised

DENORMAL = 2.0**-1074

ON_LINEAR = (5,)
ON_IMAGES = (4, 7, 6)
# Model, shape of a sample, how many BatchNorms stay when the function must not change.
CASES: dict[str, tuple[object, tuple[int, ...], int]] = {
    "after linear": (lambda: [nn.Linear(5, 6), nn.BatchNorm1d(6)], ON_LINEAR, 0),
    "before linear": (lambda: [nn.BatchNorm1d(5), nn.Linear(5, 6)], ON_LINEAR, 0),
    "without weights": (
        lambda: [nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False)],
        ON_LINEAR,
        0,
    ),
    "on both sides": (
        lambda: [nn.BatchNorm1d(5), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6)],
        ON_LINEAR,
        0,
    ),
    "after convolution": (lambda: [nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)], ON_IMAGES, 0),
    "after grouped": (lambda: [nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)], ON_IMAGES, 0),
    "before convolution": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)], ON_IMAGES, 0),
    "before grouped": (
        lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, padding="valid")],
        ON_IMAGES,
        0,
    ),
    "before padded": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)], ON_IMAGES, 1),
    "before same": (lambda: [nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")], ON_IMAGES, 1),
    "one axis": (lambda: [nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], (4, 8), 0),
    "three axes": (lambda: [nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)], (2, 4, 4, 4), 0),
    "after transposed": (
        lambda: [nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6)],
        ON_IMAGES,
        0,
    ),
    "before transposed": (
        lambda: [nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)],
        ON_IMAGES,
        1,
    ),
    "behind an activation": (lambda: [nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6)], ON_LINEAR, 1),
    "over positions": (lambda: [nn.Linear(5, 6), nn.BatchNorm1d(3)], (3, 5), 1),
}


def norms_left(nodes: object) -> int:
    return sum(node.op == "aten.batch_norm" for node in nodes)  # type: ignore[attr-defined]


def evaluated(plan: Plan, model: nn.Module, x: Tensor, *, values: bool) -> Tensor:
    folded = fold_batch_norm(plan.graph, values=values)
    state = {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
    state |= folded_parameters(folded.maps, state, plan.constants)
    stacked = {name: value[None] for name, value in state.items()}
    return evaluate(folded.graph, stacked, plan.constants, [x[None]])[0]


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_unchanged(name: str) -> None:
    layers, shape, left = CASES[name]
    torch.manual_seed(1)
    model = randomised(nn.Sequential(*layers())).double()  # type: ignore[operator]
    plan = Plan.trace(model, torch.zeros(2, *shape).double())
    assert norms_left(fold_batch_norm(plan.graph, values=True).graph.nodes) == left
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth = model(x).detach().flatten(1)
    torch.testing.assert_close(
        evaluated(plan, model, x, values=True), truth, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_differences_are_unchanged_where_the_shift_may_go(name: str) -> None:
    layers, shape, left = CASES[name]
    torch.manual_seed(1)
    model = randomised(nn.Sequential(*layers())).double()  # type: ignore[operator]
    plan = Plan.trace(model, torch.zeros(2, *shape).double())
    remaining = norms_left(fold_batch_norm(plan.graph, values=False).graph.nodes)
    assert remaining == (0 if name in ("before padded", "before same") else left)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
    truth = (model(x) - model(y)).detach().flatten(1)
    found = evaluated(plan, model, x, values=False) - evaluated(plan, model, y, values=False)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


def test_a_result_that_is_read_twice_is_left_alone() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return y + self.norm(y)

    plan = Plan.trace(Branches(), torch.zeros(2, 5))
    assert fold_batch_norm(plan.graph, values=False).graph == plan.graph


@pytest.mark.parametrize("norm", [1, 2, float("inf")])
def test_folding_tightens_upper_bounds_and_keeps_them_above(norm: float) -> None:
    model = randomised(convolutional()).double()
    x = torch.randn(20, 2, 12, 11, generator=torch.Generator().manual_seed(0)).double()
    plan = Plan.trace(model, x)
    state = model.state_dict()
    folded, layered = (plan.upper(state, norm=norm, simplify=flag) for flag in (True, False))
    assert folded.certified and layered.certified
    assert [layer.kind for layer in folded.layers[:2]] == ["conv2d + batch norm"] * 2
    assert [layer.kind for layer in layered.layers[:2]] == ["conv2d"] * 2
    lower = plan.lower(state, x, norm=norm)
    assert lower.certified
    assert 0 < lower.value <= folded.value < layered.value


def test_a_broken_variance_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    state = model.state_dict()
    state["1.running_var"] = torch.tensor([1.0, -1.0])
    plan = Plan.trace(model, torch.zeros(2, 3))
    with pytest.raises(NonFiniteError, match=r"1\.running_var"):
        plan.upper(state)
    assert plan.upper(state, simplify=False).value == float("inf")


def test_batch_norm_before_an_in_place_activation_folds() -> None:
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten()]
    model = randomised(nn.Sequential(*layers, nn.Linear(27, 2)))
    plan = Plan.trace(model, torch.zeros(2, 2, 5, 5))
    assert [node.op for node in plan.graph.nodes[1:4]] == [
        "aten.conv2d",
        "aten.batch_norm",
        "aten.relu",
    ]
    assert norms_left(fold_batch_norm(plan.graph, values=True).graph.nodes) == 0


def scalar(weight: float, *, kernel: bool = False) -> nn.Module:
    layer = nn.Conv1d(1, 1, 1, bias=False) if kernel else nn.Linear(1, 1, bias=False)
    layer.weight.data = torch.full_like(layer.weight.data, weight, dtype=torch.float64)
    return layer


def normalising(weight: float, variance: float) -> nn.Module:
    norm = nn.BatchNorm1d(1, eps=0.0)
    norm.weight.data = torch.tensor([weight], dtype=torch.float64)
    norm.running_var = torch.tensor([variance], dtype=torch.float64)
    norm.running_mean, norm.bias.data = norm.running_mean.double(), norm.bias.data.double()
    return norm


# Layers whose scales, weights or products underflow, and the shape of a sample.
UNDERFLOWS = {
    "scale of zero": (lambda: [normalising(DENORMAL, 9.0), scalar(1e200)], (1,)),
    "denormal scale": (lambda: [normalising(3 * DENORMAL, 2.25), scalar(1e300)], (1,)),
    "of a kernel": (
        lambda: [normalising(3 * DENORMAL, 2.25), scalar(1e300, kernel=True)],
        (1, 3),
    ),
    "weight of zero": (
        lambda: [scalar(1e-200), normalising(1e-200, 1.0), nn.ReLU(), scalar(1e250)],
        (1,),
    ),
    "denormal weight": (
        lambda: [scalar(1e-160), normalising(1.7e-162, 1.0), nn.ReLU(), scalar(1e250)],
        (1,),
    ),
    "from one to the next": (
        lambda: [scalar(3.0), normalising(5 * DENORMAL, 2.25), normalising(1e300, 2.0**-40)],
        (1,),
    ),
    "merged": (
        lambda: [scalar(1.3), normalising(DENORMAL, 2.25), scalar(1e280), scalar(1.1)],
        (1,),
    ),
}


def truth_of(layers: list[nn.Module]) -> Fraction:
    total = Fraction(1)
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d):
            root = Fraction(math.sqrt(float(layer.running_var)))  # of a square
            total *= Fraction(layer.weight.item()) / root
        elif not isinstance(layer, nn.ReLU):
            total *= Fraction(layer.weight.item())
    return total


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("name", UNDERFLOWS)
def test_what_underflows_in_a_fold_is_within_the_bounds(name: str, norm: float) -> None:
    make, shape = UNDERFLOWS[name]
    layers = make()
    truth = truth_of(layers)
    model = nn.Sequential(*layers).eval()
    x = torch.tensor([1.0, 1e100, 1e200], dtype=torch.float64).reshape(3, *[1] * len(shape))
    found = lipfast.bounds(model, x.expand(3, *shape).contiguous(), norm=norm)
    assert found.upper.certified and found.lower.certified
    assert Fraction(found.lower.value) <= truth <= Fraction(found.upper.value)
    if len(found.layers) == 1:
        (layer,) = found.layers
        assert Fraction(layer.lower) <= truth <= Fraction(layer.upper)
