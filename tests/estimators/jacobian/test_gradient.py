"""Jacobian norms as a regulariser: their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.norms import jacobian_norms
from tests.support.jacobian_cases import norms, perceptron, samples, small_convolutional

NORMS = [1, 2, math.inf]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu"])
def test_gradients_by_finite_differences(activation: str, norm: float) -> None:
    model = perceptron(4, 7, 3, activation=activation).double()
    parameters = list(model.parameters())
    x = samples(3, 4).double().requires_grad_()

    def function(x: Tensor, *_: Tensor) -> Tensor:
        return jacobian_norms(model, x, norm=norm, create_graph=True)

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_gradients_through_lanczos() -> None:
    model = perceptron(66, 70, 68, activation="tanh").double()
    x = samples(2, 66).double().requires_grad_()
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    values = jacobian_norms(model, x, create_graph=True)
    torch.testing.assert_close(values.detach(), norms(model, x.detach()), rtol=1e-12, atol=0)
    leaves = [x, *model.parameters()]
    # The last bias has no influence on the derivative.
    gradients = torch.autograd.grad((weights * values).sum(), leaves, allow_unused=True)
    assert gradients[-1] is None or not gradients[-1].any()
    for leaf, gradient in zip(leaves[:-1], gradients[:-1], strict=True):
        direction = samples(*leaf.shape, seed=5).double()
        found = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                leaf.add_(step * direction)
                found.append((weights * norms(model, x.detach())).sum())
                leaf.sub_(step * direction)
        slope = (found[0] - found[1]) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_values_are_those_without_a_graph(norm: float) -> None:
    model, x = small_convolutional(), samples(4, 2, 8, 8)
    with torch.no_grad():
        values = jacobian_norms(model, x, norm=norm, create_graph=True)
    assert values.requires_grad
    torch.testing.assert_close(values.detach(), jacobian_norms(model, x, norm=norm))


def test_a_regulariser_makes_the_norm_smaller() -> None:
    model, x = perceptron(5, 20, 3, activation="relu"), samples(10, 5)
    before = float(jacobian_norms(model, x).max())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        jacobian_norms(model, x, create_graph=True).max().backward()
        optimizer.step()
    assert float(jacobian_norms(model, x).max()) < 0.9 * before
    assert model.training


def test_a_zero_jacobian_has_a_finite_gradient() -> None:
    model = perceptron(3, 4, 2, activation="relu")
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    values = jacobian_norms(model, samples(2, 3), create_graph=True)
    (gradient,) = torch.autograd.grad(values.sum(), model[0].weight)
    assert torch.equal(values.detach(), torch.zeros(2))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_graph_reaches_what_made_the_samples() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    model, x = perceptron(3, 4, 2), samples(2, 3)
    values = jacobian_norms(model, scale * x, create_graph=True)
    (gradient,) = torch.autograd.grad(values.sum(), scale)
    assert float(gradient) != 0


def test_only_where_asked() -> None:
    model, x = perceptron(3, 4, 2), samples(2, 3).requires_grad_()
    assert not jacobian_norms(model, x).requires_grad
    with pytest.raises(ArgumentError, match="no backward pass"):
        jacobian_norms(model, x, method="fused", create_graph=True)
    with pytest.raises(ArgumentError, match="norm 2 only"):
        jacobian_norms(model, x, norm=1, method="lanczos", create_graph=True)


def test_models_without_second_derivatives_are_refused() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return 3.0 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 3.0 * gradient

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = Once.apply(x)
            return result

    for width in (3, 70):
        with pytest.raises(ArgumentError, match="second derivative"):
            jacobian_norms(Model(), samples(2, width), create_graph=True)


@pytest.mark.parametrize("activation", [nn.Sigmoid, nn.SiLU, nn.ReLU])
@pytest.mark.parametrize("depth", [30, 100])
def test_gradients_of_deep_networks_underflow(activation: type[nn.Module], depth: int) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(16, 16), activation())]
    x = torch.randn(3, 16)
    found = jacobian_norms(nn.Sequential(*layers), x, create_graph=True).detach()
    expected = jacobian_norms(nn.Sequential(*layers).double(), x.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-36)


def test_solvers_that_float32_is_too_short_for() -> None:
    class Solved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            matrix = x[:, :, None] * x[:, None, :] + torch.eye(x.shape[1], dtype=x.dtype)
            return torch.linalg.solve(matrix, x)

    x = 1e3 * torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert bool(jacobian_norms(Solved(), x, create_graph=True).isfinite().all())
