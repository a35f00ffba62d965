"""Per-sample gradient norms of losses and margins."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.jacobian.input_gradient import input_gradient_norms
from tests.support.jacobian_cases import perceptron, samples, small_convolutional

# The operator norm of a 1 x D Jacobian is the dual norm of the gradient.
DUAL = {1: math.inf, 2: 2, math.inf: 1}


@pytest.mark.parametrize("norm", DUAL)
def test_a_loss(norm: float) -> None:
    model, x = perceptron(6, 9, 4).eval(), samples(8, 6)
    labels = torch.arange(8) % 4

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), labels, reduction="none")

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    expected = torch.linalg.vector_norm(gradient, DUAL[norm], dim=1)
    result = input_gradient_norms(loss, x, norm=norm)
    torch.testing.assert_close(result, expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(input_gradient_norms(loss, x, norm=norm), expected)


def test_a_margin_of_images() -> None:
    model, x = small_convolutional().eval(), samples(4, 2, 8, 8)
    result = input_gradient_norms(lambda x: model(x)[:, 0] - model(x)[:, 1], x)
    rows = [
        torch.autograd.functional.jacobian(lambda s: model(s[None])[0, 0] - model(s[None])[0, 1], s)
        for s in x
    ]
    torch.testing.assert_close(result, torch.stack([row.norm() for row in rows]))


def test_a_module_is_evaluated_in_eval_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    x = samples(5, 6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    result = input_gradient_norms(model, x)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(result, lipfast.jacobian_norms(model, x))


@pytest.mark.parametrize("norm", DUAL)
def test_differentiable(norm: float) -> None:
    model = perceptron(3, 5, 1).double()
    x = samples(4, 3).double().requires_grad_()

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return input_gradient_norms(model, x, norm=norm, create_graph=True)

    assert torch.autograd.gradcheck(function, (x, *model.parameters()))
    assert not input_gradient_norms(model, x).requires_grad


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"shape \(3, 2\) for 3 samples"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x.argmax(1), "int64"),
        (lambda x: x.detach().sum(1), "through autograd"),
        (lambda x: torch.ones(3, requires_grad=True), "through autograd"),
        (lambda x: 3, "a int"),
        (3, "callable"),
    ],
)
def test_bad_functions(function: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        input_gradient_norms(function, torch.ones(3, 2))  # type: ignore[arg-type]


def test_bad_samples() -> None:
    with pytest.raises(NonFiniteError, match="sample 1"):
        input_gradient_norms(lambda x: x.sum(1), torch.tensor([[1.0], [math.nan]]))
    with pytest.raises(ArgumentError, match="int64"):
        input_gradient_norms(lambda x: x.sum(1), torch.ones(2, 2).long())
    with pytest.raises(ArgumentError, match="no samples"):
        input_gradient_norms(lambda x: x.sum(1), torch.ones(0, 2))


def test_an_error_of_the_function_says_where_it_is() -> None:
    with pytest.raises(ArgumentError, match=r"cannot be evaluated .* \(at .*py:\d+\): IndexError"):
        input_gradient_norms(lambda x: x.sum(1), samples(8, 6)[:, 0])
    with pytest.raises(ArgumentError, match="takes 0 positional arguments"):
        input_gradient_norms(lambda: samples(8, 6), samples(8, 6))  # type: ignore[arg-type]
