"""Per-sample Jacobian norms, against explicit Jacobians and their singular values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, NonFiniteError, UnsupportedOpError
from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.networks import plan_jacobian_norms
from lipfast.estimators.jacobian.norms import jacobian_norms
from lipfast.estimators.jacobian.rows import explicit_jacobians
from lipfast.estimators.plan import Plan

MODELS = {
    "relu chain": lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4), nn.ReLU()),
    "leaky chain": lambda: nn.Sequential(nn.Linear(6, 9), nn.LeakyReLU(0.2), nn.Linear(9, 4)),
    "linear": lambda: nn.Linear(6, 3),
    "tanh": lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)),
    "no parameters": lambda: nn.Softmax(dim=1),
}

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def explicit(model: nn.Module, x: Tensor) -> Tensor:
    rows = [torch.autograd.functional.jacobian(model, sample[None]).flatten(1) for sample in x]
    return torch.stack([row.reshape(-1, x[0].numel()) for row in rows])


def samples(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("name", MODELS)
def test_against_explicit_jacobians(name: str, norm: float) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    x = samples(7, 6)
    result = jacobian_norms(model, x, norm=norm)
    assert result.shape == (7,)
    assert result.dtype == torch.float32
    assert model.training
    reference = torch.linalg.matrix_norm(explicit(model.double().eval(), x.double()), norm)
    torch.testing.assert_close(result.double(), reference, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("outputs", [1, 2, 10, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("inputs", [20, 90])
def test_one_to_a_thousand_outputs(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    """By whichever method is chosen: the fused op, rows or Lanczos."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, 37), nn.Tanh(), nn.Linear(37, outputs)).to(dtype)
    x = samples(3, inputs).to(dtype)
    result = jacobian_norms(model, x).double()
    truth = torch.linalg.matrix_norm(explicit(model.double(), x.double()), 2)
    assert float((result / truth - 1).abs().max()) <= TOLERANCE[dtype]


def test_buffers_and_generators_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    jacobian_norms(model, samples(4, 6))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_whatever_the_grad_mode(mode: type) -> None:
    torch.manual_seed(0)
    model = MODELS["tanh"]()
    x = samples(4, 6)
    reference = jacobian_norms(model, x)
    with mode():
        torch.testing.assert_close(jacobian_norms(model, x.clone()), reference)
        plan = Plan.trace(model, x)
        assert plan.lower(model.state_dict(), x.clone()).certified


def test_small_memory_budget_gives_the_same() -> None:
    torch.manual_seed(0)
    model = MODELS["tanh"]()
    x = samples(9, 6)
    torch.testing.assert_close(jacobian_norms(model, x, memory=1), jacobian_norms(model, x))


def test_functions_that_vmap_cannot_batch_take_one_pass_per_row() -> None:
    class Unbatched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 3.0

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * float(torch.ones(()).item()) * (3.0 + 0.0 * float(gradient.sum()))

    with differentiating():
        problem = SampleFunction(Unbatched.apply, samples(4, 2), 2)
        (block,) = explicit_jacobians(problem, 1 << 20)
    torch.testing.assert_close(block, 3.0 * torch.eye(2).expand(4, 2, 2))


def test_dict_outputs_and_images() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.linear(x.flatten(1)), "x": 2 * x}

    model = Net()
    x = samples(3, 2, 3)
    joined = torch.cat([model.linear.weight.detach(), 2 * torch.eye(6)])
    expected = float(torch.linalg.matrix_norm(joined, 2))
    torch.testing.assert_close(jacobian_norms(model, x), torch.full((3,), expected))


def test_residual_networks_are_not_chains() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.linear(x))

    torch.manual_seed(0)
    model = Residual()
    plan = Plan.trace(model, torch.zeros(2, 3))
    assert plan.chain is None
    x = samples(5, 3)
    result = plan_jacobian_norms(plan, [plan.resolve(model.state_dict())], x)[0]
    reference = torch.linalg.matrix_norm(explicit(model, x), 2)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


def test_method_fused_says_why_not() -> None:
    with pytest.raises(ArgumentError, match="a chain of linear layers"):
        jacobian_norms(MODELS["no parameters"](), samples(2, 6), method="fused")
    with pytest.raises(UnsupportedOpError):
        jacobian_norms(Cumulative(), samples(2, 6), method="fused")
    with pytest.raises(ArgumentError, match="method must be"):
        jacobian_norms(MODELS["tanh"](), samples(2, 6), method="magic")  # type: ignore[arg-type]


def test_outputs_that_have_no_jacobian() -> None:
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    class Total(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    with pytest.raises(ArgumentError, match="only floating outputs"):
        jacobian_norms(Classes(), samples(3, 4))
    with pytest.raises(ArgumentError, match="first dimension must be the samples"):
        jacobian_norms(Total(), samples(3, 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([1.0], ArgumentError, "must be a tensor"),
        (torch.zeros(2, 6, dtype=torch.int64), ArgumentError, "torch.int64"),
        (torch.zeros(0, 6), ArgumentError, "no samples"),
        (torch.tensor(1.0), ArgumentError, "first dimension"),
        (torch.full((3, 6), math.nan), NonFiniteError, "3 of 3 samples"),
    ],
)
def test_bad_samples(x: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        jacobian_norms(nn.Linear(6, 2), x)  # type: ignore[arg-type]
