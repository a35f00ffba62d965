"""What is dropped or joined after tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import UnsupportedOpError
from lipfast.estimators.plan import Plan
from lipfast.plan.interpret import evaluate
from lipfast.plan.state import stack


def ops(model: nn.Module, example: Tensor) -> list[str]:
    return [node.op for node in Plan.trace(model, example).graph.nodes[1:]]


class Custom(nn.Module):
    """A module around a function of its input and one matrix."""

    def __init__(self, function: object, *shape: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.function = function
        if shape:
            self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, self.weight) if hasattr(self, "weight") else (x,)
        return self.function(*arguments)  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.Dropout(0.3),
        nn.AlphaDropout(),
        Custom(lambda x: x.contiguous().clone()),
        Custom(lambda x: x.detach()),
        Custom(lambda x: x.double().float()),
    ],
)
def test_identities_are_dropped(layer: nn.Module) -> None:
    assert ops(nn.Sequential(layer, nn.ReLU(), layer), torch.zeros(2, 3)) == ["aten.relu"]


def test_identity_model_is_its_input() -> None:
    plan = Plan.trace(nn.Identity(), torch.zeros(2, 3))
    assert plan.graph.outputs == (plan.graph.nodes[0].name,)


def test_casts_to_integers_are_not_identities() -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten\.to"):
        Plan.trace(Custom(lambda x: x.to(torch.int64).float()), torch.zeros(2, 3))


def test_softsign_is_recognised() -> None:
    assert ops(nn.Softsign(), torch.zeros(2, 3)) == ["lipfast.softsign"]


def test_other_quotients_are_not_softsign() -> None:
    with pytest.raises(UnsupportedOpError, match="quotient of two activations"):
        Plan.trace(Custom(lambda x: x / (1 + x.abs().flip(1))), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda x, w: x @ w.t(), (4, 3), ["aten.linear"]),
        (lambda x, w: x @ w.transpose(0, 1), (4, 3), ["aten.linear"]),
        (lambda x, w: torch.mm(x, w.T), (4, 3), ["aten.linear"]),
        (lambda x, w: x @ w, (3, 4), ["lipfast.matmul"]),
        (lambda x, w: torch.addmm(w[0] * 0 + w[0], x, w), (3, 3), ["lipfast.matmul"]),
    ],
)
def test_products_with_parameters(
    function: object, shape: tuple[int, int], expected: list[str]
) -> None:
    model = Custom(function, *shape)
    plan = Plan.trace(model, torch.zeros(2, 3))
    assert [node.op for node in plan.graph.nodes[1:]] == expected
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    stacked = stack([plan.resolve(model.state_dict())], plan.used_parameters, torch.float32)
    torch.testing.assert_close(evaluate(plan.graph, stacked, {}, [x[None]])[0], model(x).detach())


def test_unused_branches_are_dropped() -> None:
    assert ops(Custom(lambda x: (torch.sin(x), torch.relu(x))[1]), torch.zeros(2, 3)) == [
        "aten.relu"
    ]


def test_in_place_operations_are_made_functional() -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 2.0
        z = torch.relu_(y)
        return y + z

    plan = Plan.trace(Custom(function), torch.zeros(2, 3))
    x = torch.tensor([[[-1.0, 0.5, 2.0]]])
    result = evaluate(plan.graph, {}, plan.constants, [x])
    assert torch.equal(result, torch.tensor([[[0.0, 2.0, 8.0]]]))


CHOICES = {
    "max": (lambda x: torch.max(x, x.flip(1)), "aten.maximum"),
    "min": (lambda x: torch.min(x, x.flip(1)), "aten.minimum"),
    "fmax": (lambda x: torch.fmax(x, x.flip(1)), "aten.maximum"),
    "fmin": (lambda x: torch.fmin(x, x.flip(1)), "aten.minimum"),
    "relu": (lambda x: torch.where(x > 0, x, 0.0), "aten.clamp_min"),
    "relu, the other way round": (lambda x: torch.where(x <= 0, 0.0, x), "aten.clamp_min"),
    "relu by a mask": (lambda x: x * (x > 0), "aten.clamp_min"),
    "relu by a cast mask": (lambda x: (x >= 0).float() * x, "aten.clamp_min"),
    "negative part": (lambda x: x * (x < 0).to(x.dtype), "aten.clamp_max"),
    "leaky relu": (lambda x: torch.where(x > 0, x, 0.2 * x), "aten.leaky_relu"),
    "leaky relu, swapped": (lambda x: torch.where(x < 0, x * 0.2, x), "aten.leaky_relu"),
    "abs": (lambda x: torch.where(x > 0, x, -x), "aten.abs"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choices_are_recognised(name: str) -> None:
    function, op = CHOICES[name]
    model = Custom(function)
    plan = Plan.trace(model, torch.zeros(2, 4))
    assert plan.graph.nodes[-1].op == op
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(plan.graph, {}, plan.constants, [x])[0], model(x[0]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.where(x > 1, x, 0.0),
        lambda x: torch.where(x > 0, x, 0.2 * x.flip(1)),
        lambda x: torch.where(x > x.flip(1), x, 2.0),
        lambda x: x * (x > 1),
        lambda x: x * (x.flip(1) > 0),
    ],
)
def test_choices_that_jump_are_refused(function: object) -> None:
    with pytest.raises(UnsupportedOpError, match=r"aten\.gt"):
        Plan.trace(Custom(function), torch.zeros(2, 4))


@pytest.mark.parametrize(("start", "length"), [(-2, 2), (-3, 2), (0, 2), (1, 3), (-1, 0), (0, 0)])
def test_narrow_is_a_slice(start: int, length: int) -> None:
    model = Custom(lambda x: x.narrow(-1, start, length))
    plan = Plan.trace(model, torch.zeros(2, 4))
    assert [node.op for node in plan.graph.nodes[1:]] == ["aten.slice"]
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(plan.graph, {}, plan.constants, [x])[0], model(x[0]))
