"""Merging affine maps leaves the function, or its differences, as they are; bounds get tighter."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lipfast.estimators.plan import Plan
from lipfast.plan.computed import evaluate_computed
from lipfast.plan.interpret import evaluate
from lipfast.plan.merge import Merged, merge_affine
from tests.support.explicit import NORMS, matrix_of, traced
from tests.support.networks import randomised

IMAGE = (2, 9, 8)
# Model, shape of a sample, affine maps left when values must stay, and when differences must.
CASES: dict[str, tuple[object, tuple[int, ...], int, int]] = {
    "linear": (lambda: [nn.Linear(5, 7), nn.Linear(7, 3)], (5,), 1, 1),
    "three": (lambda: [nn.Linear(5, 7), nn.Linear(7, 3, bias=False), nn.Linear(3, 4)], (5,), 1, 1),
    "over positions": (lambda: [nn.Linear(5, 7), nn.Dropout(), nn.Linear(7, 3)], (2, 5), 1, 1),
    "apart": (lambda: [nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)], (5,), 2, 2),
    "second 1 x 1": (
        lambda: [nn.Conv2d(2, 5, 3, padding=1, stride=2), nn.Conv2d(5, 3, 1, stride=2)],
        IMAGE,
        1,
        1,
    ),
    "first 1 x 1": (lambda: [nn.Conv2d(2, 5, 1), nn.Conv2d(5, 3, 3, padding=1)], IMAGE, 2, 1),
    "first 1 x 1 without a bias": (
        lambda: [nn.Conv2d(2, 5, 1, stride=2, bias=False), nn.Conv2d(5, 3, 3, padding=1)],
        IMAGE,
        1,
        1,
    ),
    "not padded": (
        lambda: [nn.Conv2d(2, 5, (3, 2), padding=1), nn.Conv2d(5, 3, 2, stride=2)],
        IMAGE,
        1,
        1,
    ),
    "stride and dilation": (
        lambda: [nn.Conv2d(2, 4, 2, stride=2, dilation=2), nn.Conv2d(4, 3, 2, dilation=(1, 1))],
        (2, 13, 12),
        1,
        1,
    ),
    "uneven dilation": (
        lambda: [nn.Conv1d(2, 4, 3, dilation=3), nn.Conv1d(4, 3, 3, dilation=2, padding="valid")],
        (2, 14),
        1,
        1,
    ),
    "cropped": (
        lambda: [nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 3, 3, padding=1)],
        IMAGE,
        2,
        2,
    ),
    "groups": (lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.Conv2d(4, 3, 1)], IMAGE, 2, 2),
    "same": (lambda: [nn.Conv2d(2, 4, 3, padding="same"), nn.Conv2d(4, 3, 1)], IMAGE, 2, 2),
    "computed": (
        lambda: [parametrizations.weight_norm(nn.Linear(5, 7)), nn.Linear(7, 3)],
        (5,),
        1,
        1,
    ),
}


def built(name: str) -> tuple[nn.Module, Plan, tuple[int, ...]]:
    layers, shape, _, _ = CASES[name]
    torch.manual_seed(1)
    model = randomised(nn.Sequential(*layers())).double()  # type: ignore[operator]
    return model, traced(model, shape), shape


def affine(merged: Merged) -> int:
    kinds = ("aten.linear", "aten.conv", "lipfast.matmul")
    return sum(node.op.startswith(kinds) for node in merged.graph.nodes)


def evaluated(plan: Plan, model: nn.Module, merged: Merged, x: Tensor) -> Tensor:
    tensors = plan.resolve(model.state_dict())
    tensors |= evaluate_computed(merged.nodes, tensors, plan.constants)
    stacked = {name: value[None] for name, value in tensors.items()}
    return evaluate(merged.graph, stacked, plan.constants, [x[None]])[0]


@pytest.mark.parametrize("name", CASES)
def test_the_function_is_unchanged(name: str) -> None:
    model, plan, shape = built(name)
    merged = merge_affine(plan.graph, plan.shapes, values=True)
    assert affine(merged) == CASES[name][2]
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    truth = model(x).detach().flatten(1)
    torch.testing.assert_close(evaluated(plan, model, merged, x), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_differences_are_unchanged(name: str) -> None:
    model, plan, shape = built(name)
    merged = merge_affine(plan.graph, plan.shapes, values=False)
    assert affine(merged) == CASES[name][3]
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(2, 3, *shape, dtype=torch.float64, generator=generator)
    truth = (model(x) - model(y)).detach().flatten(1)
    found = evaluated(plan, model, merged, x) - evaluated(plan, model, merged, y)
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "apart"])
def test_merged_bounds_are_tighter_and_never_below(name: str) -> None:
    model, plan, shape = built(name)
    matrix = matrix_of(model, shape)
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        merged, layered = (
            plan.upper(model.state_dict(), norm=norm, simplify=flag) for flag in (True, False)
        )
        assert merged.certified and layered.certified
        assert truth * (1 - 1e-13) <= merged.value <= layered.value * (1 + 1e-3)
        if merged.layers != layered.layers and len(shape) < 3:
            exact = len(merged.layers) == 1 and len(shape) == 1
            assert merged.value <= truth * (1 + 2e-6) or not exact
    assert all("merged" in layer.kind for layer in plan.layers) == (len(plan.layers) == 1)


def test_batch_norms_fold_first_and_the_layer_is_named_after_both() -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)]
    model = randomised(nn.Sequential(*layers, nn.BatchNorm2d(3))).double()
    plan = traced(model, (2, 5, 5))
    (layer,) = plan.layers
    assert (layer.name, layer.kind) == ("0 + 2", "conv2d, 2 merged")
    assert layer.shape == (3, 2, 3, 3)
    truth = float(torch.linalg.matrix_norm(matrix_of(model, (2, 5, 5)), 2))
    bound = plan.upper(model.state_dict())
    assert truth <= bound.value <= plan.upper(model.state_dict(), simplify=False).value
    x = torch.randn(5, 2, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    assert 0 < plan.lower(model.state_dict(), x).value <= bound.value


def test_rounding_of_the_product_is_in_the_bracket() -> None:
    """Two maps that cancel: the merged weight is rounding only, and its bound says so."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(first)
        model[1].weight.copy_(torch.linalg.inv(first))
    plan = traced(model, (6,))
    bound = plan.upper(model.state_dict())
    room = 8 * 2.0**-53 * float((model[1].weight.abs() @ model[0].weight.abs()).detach().norm())
    assert bound.layers[0].lower <= 1.0 - room / 8 or bound.value >= 1.0 + room / 8
    assert math.isclose(bound.value, 1.0, rel_tol=1e-5)


def test_outputs_and_branches_stay() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.first(x)
            return y, self.second(y)

    plan = Plan.trace(Branches(), torch.zeros(2, 5))
    assert merge_affine(plan.graph, plan.shapes, values=False).graph == plan.graph
    assert len(plan.layers) == 2


def test_merging_keeps_what_bounds_a_product() -> None:
    """Rows behind a normalisation and two merged layers are still bounded."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.inner, self.outer = nn.LayerNorm(4), nn.Linear(4, 3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.outer(self.inner(self.norm(x)))
            return y * y

    model = Gated().double()
    plan = traced(model, (4,))
    assert len(plan.layers) == 1
    bound = plan.upper(model.state_dict())
    assert math.isfinite(bound.value)
    x = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lower = plan.lower(model.state_dict(), 1e-3 * x)
    assert 0 < lower.value <= bound.value


def test_products_beyond_float64_stay_apart_and_leave_the_others_alone() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(3)])
    plan = Plan.trace(model, torch.zeros(2, 3))
    ordinary = model.state_dict()
    huge = {name: torch.eye(3, dtype=torch.float64) * 1e200 for name in ordinary}
    tiny = {name: torch.eye(3, dtype=torch.float64) * 1e-200 for name in ordinary}
    found = plan.upper([huge, ordinary, tiny])
    assert [len(bound.layers) for bound in found] == [3, 1, 3]
    assert all(bound.certified for bound in found)
    assert found[0].log_value == pytest.approx(600 * math.log(10), rel=1e-6)
    assert found[2].log_value == pytest.approx(-600 * math.log(10), rel=1e-6)
    assert found[1] == plan.upper(ordinary)
