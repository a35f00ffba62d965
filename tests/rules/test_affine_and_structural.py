"""Linear layers, sums of branches and scalings: constants against explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import UnsupportedOpError
from lipfast.estimators.plan import Plan

NORMS = [1, 2, math.inf]


class Function(nn.Module):
    """A linear map written out by hand; its matrices are parameters."""

    def __init__(self, function: object, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(*shape, dtype=torch.float64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator,no-any-return]


def matrix_norm(model: nn.Module, shape: tuple[int, ...], norm: float) -> float:
    """Norm of an affine model, from its explicit matrix."""
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        shift = model(torch.zeros(1, *shape, dtype=torch.float64))
        columns = (model(unit) - shift).reshape(size, -1)
    return float(torch.linalg.matrix_norm(columns.T, norm))


EXACT = {
    "linear": (Function(lambda m, x: nn.functional.linear(x, m.w, m.b), w=(4, 3), b=(4,)), (3,)),
    "linear over positions": (
        Function(lambda m, x: nn.functional.linear(x, m.w), w=(4, 3)),
        (5, 3),
    ),
    "product with a matrix": (Function(lambda m, x: x @ m.w, w=(3, 4)), (3,)),
    "product with a transpose": (Function(lambda m, x: x @ m.w.t() + m.b, w=(4, 3), b=(4,)), (3,)),
    "flatten": (Function(lambda m, x: x.flatten(1) @ m.w, w=(6, 4)), (2, 3)),
    "view and back": (Function(lambda m, x: x.view(x.size(0), -1).reshape(-1, 3, 2)), (2, 3)),
    "shift": (Function(lambda m, x: x + m.b - 3.0, b=(3,)), (3,)),
    "scale by a vector": (Function(lambda m, x: x * m.s, s=(3,)), (3,)),
    "scale by numbers": (Function(lambda m, x: (-3 * x) / 7.0), (3,)),
    "division by a vector": (Function(lambda m, x: x / m.s, s=(3,)), (3,)),
    "negation": (Function(lambda m, x: -x), (3,)),
    "broadcast to more positions": (Function(lambda m, x: x + m.b, b=(4, 3)), (1, 3)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", EXACT)
def test_exact_constants(name: str, norm: float) -> None:
    model, shape = EXACT[name]
    plan = Plan.trace(model, torch.zeros(2, *shape, dtype=torch.float64))
    bound = plan.upper(model.state_dict(), norm=norm)
    truth = matrix_norm(model, shape, norm)
    assert bound.certified
    assert bound.value >= truth * (1 - 1e-15)
    assert bound.value <= truth * (1 + 2e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", EXACT)
def test_lower_bounds_of_affine_maps_are_tight(name: str, norm: float) -> None:
    model, shape = EXACT[name]
    plan = Plan.trace(model, torch.zeros(2, *shape, dtype=torch.float64))
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lower = plan.lower(model.state_dict(), x, norm=norm)
    truth = matrix_norm(model, shape, norm)
    assert lower.certified
    assert truth * (1 - 1e-10) <= lower.value <= truth * (1 + 1e-15)


@pytest.mark.parametrize("norm", NORMS)
def test_scaling_that_broadcasts_counts_the_copies(norm: float) -> None:
    model = Function(lambda m, x: x * m.s, s=(4, 3))
    plan = Plan.trace(model, torch.zeros(2, 1, 3, dtype=torch.float64))
    copies = {1: 4.0, 2: 2.0, math.inf: 1.0}[norm]
    bound = plan.upper(model.state_dict(), norm=norm).value
    assert bound >= matrix_norm(model, (1, 3), norm) * (1 - 1e-15)
    assert bound == pytest.approx(copies * float(model.s.detach().abs().max()))


@pytest.mark.parametrize("norm", NORMS)
def test_residual_block_adds_one(norm: float) -> None:
    model = Function(lambda m, x: x + torch.relu(x @ m.w), w=(3, 3))
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    inner = float(torch.linalg.matrix_norm(model.w.detach().T, norm))
    bound = plan.upper(model.state_dict(), norm=norm)
    assert 1 + inner <= bound.value <= (1 + inner) * (1 + 1e-6)


def test_difference_with_alpha_and_an_operand_used_twice() -> None:
    model = Function(lambda m, x: torch.sub(x, torch.relu(x.flip(1)), alpha=3) + x)
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    assert plan.upper({}).value == pytest.approx(5.0)
    doubled = Plan.trace(Function(lambda m, x: torch.add(x, x, alpha=-2)), torch.zeros(2, 3))
    assert doubled.upper({}).value == pytest.approx(3.0)
    assert doubled.lower({}, torch.ones(1, 3)).value == pytest.approx(1.0)


def test_several_outputs_are_one_vector() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": 3 * x, "b": (4 * x, x)}

    plan = Plan.trace(Two(), torch.zeros(2, 3))
    x = torch.ones(1, 3)
    for norm, expected in ((1, 8.0), (2, math.sqrt(26)), (math.inf, 4.0)):
        assert plan.upper({}, norm=norm).value == pytest.approx(expected)
        assert plan.lower({}, x, norm=norm).value == pytest.approx(expected)


def test_several_inputs_have_a_lower_bound_that_is_not_certified() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + 2 * y

    plan = Plan.trace(Sum(), (torch.zeros(2, 3), torch.zeros(2, 3)))
    assert plan.upper({}).value == pytest.approx(3.0)
    with pytest.raises(ValueError, match="2 inputs"):
        plan.lower({}, torch.zeros(2, 3))
    lower = plan.lower({}, (torch.zeros(2, 3), torch.ones(2, 3)))
    assert lower.jacobian.value == pytest.approx(math.sqrt(5))  # of (x, y) together, as one vector
    assert not lower.certified


def test_division_by_zero_is_unbounded() -> None:
    model = Function(lambda m, x: x / m.s, s=(3,))
    plan = Plan.trace(model, torch.zeros(2, 3, dtype=torch.float64))
    bound = plan.upper({"s": torch.tensor([1.0, 0.0, 2.0])})
    assert bound.value == math.inf
    assert "divides by zero" in (bound.reason or "")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x / (1 + x.flip(1)), "two activations"),
        (lambda m, x: 1.0 / x, r"aten\.reciprocal|division by an activation"),
        (lambda m, x: x.view(torch.int64).view(torch.float64), "reinterprets"),
        (lambda m, x: x @ torch.lgamma(m.w), "lgamma .applied to parameters only"),
        (lambda m, x: torch.div(x, 2.0, rounding_mode="floor"), "rounds"),
    ],
)
def test_nodes_beyond_the_rules(function: object, message: str) -> None:
    with pytest.raises(UnsupportedOpError, match=message):
        Plan.trace(Function(function, w=(4, 4)), torch.zeros(2, 4, dtype=torch.float64))
