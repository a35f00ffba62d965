"""Lanczos without Jacobians, against the singular values of explicit ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.lanczos import SingularTriplets, lanczos_triplets
from lipfast.estimators.jacobian.linearization import DerivativeError, Linearization, footprint
from lipfast.estimators.jacobian.methods import JacobianNorms
from lipfast.estimators.jacobian.norms import jacobian_norms
from tests.support.jacobian_cases import ACTIVATIONS, jacobians, norms, perceptron, samples

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "leaky relu", "tanh", "gelu", "hardtanh", "elu"])
@pytest.mark.parametrize("widths", [(70, 90, 65), (67, 81, 75, 113), (130, 66)], ids=str)
def test_against_singular_values(
    widths: tuple[int, ...], activation: str, dtype: torch.dtype
) -> None:
    model = perceptron(*widths, activation=activation).to(dtype)
    x = samples(5, widths[0]).to(dtype)
    found = jacobian_norms(model, x, details=True)
    assert found.method == "lanczos"
    assert found.values.dtype == dtype
    truth = norms(model, x)
    assert float((found.values.double() / truth - 1).abs().max()) <= TOLERANCE[dtype]


def test_a_thousand_outputs() -> None:
    model = perceptron(120, 140, 1000, activation="relu")
    x = samples(6, 120)
    truth = norms(model, x)
    assert float((jacobian_norms(model, x).double() / truth - 1).abs().max()) <= 1e-5


def matrix_model(matrix: Tensor) -> nn.Linear:
    model = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    model.weight.data = matrix
    return model


def with_spectrum(values: Tensor) -> Tensor:
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        for _ in range(2)
    )
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [0.3, 0.01])
def test_a_first_vector_orthogonal_to_the_seeded_start(gap: float, dtype: torch.dtype) -> None:
    """Made for the vector that every sample starts from: signs of its image turn that away."""
    side = 80
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64, device="cpu")
    basis = torch.randn(side, side, generator=torch.Generator().manual_seed(1)).double()
    basis[:, 0] -= start * (start @ basis[:, 0]) / (start @ start)
    right = torch.linalg.qr(basis)[0]
    values = torch.full((side,), 0.3, dtype=torch.float64)
    values[0], values[1] = 1.0, 1 - gap
    assert abs(float(start @ right[:, 0])) < 1e-12
    model = matrix_model((right @ torch.diag(values) @ right.T).to(dtype))
    found = jacobian_norms(model, samples(2, side).to(dtype), method="lanczos")
    torch.testing.assert_close(found.double(), torch.ones(2).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        torch.ones(80),
        torch.zeros(80),
        torch.tensor([5.0] + [0.0] * 79),
        torch.tensor([5.0, 5.0] + [1.0] * 78),
        torch.linspace(0.99, 1.0, 80),  # the basis is full before it converges
        torch.linspace(0.999, 1.0, 300),
        10.0 ** -torch.arange(80.0),
    ],
    ids=["flat", "zero", "rank one", "double", "dense", "denser, restarted", "decaying"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectra(values: Tensor, dtype: torch.dtype) -> None:
    model = matrix_model(with_spectrum(values.double()).to(dtype))
    found = jacobian_norms(model, samples(2, len(values)).to(dtype), method="lanczos", details=True)
    expected = torch.full((2,), float(values.max()), dtype=torch.float64)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(found.values.double(), expected, rtol=tolerance, atol=0)
    assert found.residuals is not None
    assert bool((found.residuals < (2e-2 if dtype == torch.float32 else 1e-5)).all())


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_squares_do_not_leave_the_range(size: float) -> None:
    model = matrix_model(size * with_spectrum(torch.linspace(0.1, 1.0, 70).double()).float())
    values = jacobian_norms(model, samples(2, 70))
    torch.testing.assert_close(values, torch.full((2,), size), rtol=1e-5, atol=0)


def test_residuals_bound_the_distance_to_a_singular_value() -> None:
    model = perceptron(70, 90, 80).double()
    x = samples(4, 70).double()
    problem = SampleFunction(model.requires_grad_(False), x, 80)
    spectra = torch.linalg.svdvals(jacobians(model, x))
    with differentiating():
        size = footprint(problem)
        for passes in (3, 12, 40):
            found = lanczos_triplets(problem, size, memory=1 << 30, max_passes=passes)
            distance = (spectra - found.values[:, None]).abs().amin(1)
            assert bool((distance <= found.residuals * found.values + 1e-12).all())
            assert bool((found.values <= spectra[:, 0] * (1 + 1e-12)).all())
            assert int(found.passes.max()) <= passes
            check_triplets(found, jacobians(model, x))


def check_triplets(found: SingularTriplets, explicit: Tensor) -> None:
    image = torch.bmm(explicit, found.right[:, :, None]).squeeze(2)
    torch.testing.assert_close(image, found.values[:, None] * found.left)
    ones = torch.ones(len(explicit), dtype=torch.float64)
    torch.testing.assert_close(found.right.norm(dim=1), ones)
    torch.testing.assert_close(found.left.norm(dim=1), ones)


def test_more_inputs_than_outputs() -> None:
    model = perceptron(300, 80, 70, activation="relu").double()
    x = samples(3, 300).double()
    problem = SampleFunction(model.requires_grad_(False), x, 70)
    with differentiating():
        found = lanczos_triplets(problem, footprint(problem), memory=1 << 30)
    torch.testing.assert_close(found.values, norms(model, x), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.left.norm(dim=1), torch.ones(3, dtype=torch.float64))
    back = torch.bmm(found.left[:, None], jacobians(model, x)).squeeze(1)
    torch.testing.assert_close(back, found.values[:, None] * found.right, rtol=1e-5, atol=1e-6)


def test_a_value_does_not_depend_on_its_block() -> None:
    model = perceptron(70, 90, 80, activation="relu")
    x = samples(9, 70)
    together = jacobian_norms(model, x)
    for memory in (1, 1 << 20):
        torch.testing.assert_close(
            jacobian_norms(model, x, memory=memory), together, rtol=1e-5, atol=0
        )


def test_derivatives_that_do_not_exist_are_not_a_number() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs().sqrt()

    x = samples(3, 70)
    x[1, 4] = 0.0
    values = jacobian_norms(Root(), x, method="lanczos")
    assert values.isnan().tolist() == [False, True, False]


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3.0 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 3.0 * gradient


class Detaching(torch.autograd.Function):
    """Its backward pass hides half of itself from autograd."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 3.0 * x

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2.0 * gradient + gradient.detach()


@pytest.mark.parametrize("function", [OnceDifferentiable, Detaching])
@pytest.mark.parametrize("inputs", [20, 70])
def test_wrong_second_derivatives_are_not_used(
    function: type[torch.autograd.Function], inputs: int
) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([function.apply(x)] * 4, 1)

    x = samples(2, inputs)
    found = jacobian_norms(Model(), x, details=True)
    assert found.method == "rows"
    torch.testing.assert_close(found.values, torch.full((2,), 6.0))
    with pytest.raises(DerivativeError, match="rows"):
        jacobian_norms(Model(), x, method="lanczos")


def test_forward_mode_where_there_is_no_second_derivative() -> None:
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 3.0 * x

        @staticmethod
        def setup_context(ctx: object, inputs: object, output: object) -> None:
            pass

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return 3.0 * gradient

        @staticmethod
        def jvp(ctx: object, tangent: Tensor) -> Tensor:
            return 3.0 * tangent

    with differentiating():
        linear = Linearization(ForwardOnly.apply, samples(2, 5))
        torch.testing.assert_close(linear.jvp(torch.ones(2, 5)), torch.full((2, 5), 3.0))


@pytest.mark.parametrize("norm", [1, math.inf])
def test_other_norms_are_refused(norm: float) -> None:
    with pytest.raises(ArgumentError, match="norm 2 only"):
        jacobian_norms(nn.Linear(3, 3), samples(2, 3), norm=norm, method="lanczos")


def test_details_of_the_other_methods() -> None:
    model, x = perceptron(4, 5, 3, activation="relu"), samples(2, 4)
    for method in ("fused", "rows"):
        found = jacobian_norms(model, x, method=method, details=True)
        assert isinstance(found, JacobianNorms)
        assert (found.method, found.residuals, found.passes) == (method, None, None)
    assert set(ACTIVATIONS) >= {"relu", "tanh"}
