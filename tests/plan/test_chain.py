"""Which plans are chains, and that the stages are the function of the plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipfast.errors import NonFiniteError
from lipfast.estimators.plan import Plan
from lipfast.ops.chain_stages import Activation, AveragePool, ConvStage, Flatten, Linear, MaxPool
from lipfast.plan.chain import Chain
from lipfast.reference.chain_jacobian_norms import chain_jacobian_norms
from tests.support.networks import convolutional, randomised


def chain_of(model: nn.Module, shape: tuple[int, ...]) -> Chain | None:
    return Plan.trace(model, torch.zeros(2, *shape)).chain


def test_linear_chains() -> None:
    layers = [nn.Flatten(), nn.Linear(6, 4, bias=False), nn.Identity(), nn.Linear(4, 4)]
    chain = chain_of(nn.Sequential(*layers, nn.LeakyReLU(0.5), nn.Linear(4, 2)), (2, 3))
    assert chain is not None
    assert chain.weights == ("1.weight", "3.weight", "5.weight")
    assert chain.biases == (None, "3.bias", "5.bias")
    activation = Activation("leaky_relu", (0.5,))
    assert chain.stages == (Flatten(), Linear(), Linear(), activation, Linear())


def test_convolutional_chains_with_batch_norm_folded() -> None:
    chain = chain_of(convolutional(nn.SiLU()), (2, 12, 11))
    assert chain is not None
    assert chain.stages == (
        ConvStage((1, 1), (1, 1), (1, 1), 1),
        Activation("silu"),
        MaxPool((2, 2), (2, 2), (0, 0), (1, 1)),
        ConvStage((2, 2), (0, 0), (1, 1), 2),
        Activation("silu"),
        AveragePool((2, 2), (2, 2), (0, 0), ceil_mode=True),
        Flatten(),
        Linear(),
    )
    assert len(chain.maps) == 2


@pytest.mark.parametrize(
    ("activation", "stage"),
    [
        (nn.ReLU6(), Activation("hardtanh", (0.0, 6.0))),
        (nn.Hardtanh(-0.5, 2.0), Activation("hardtanh", (-0.5, 2.0))),
        (nn.Tanh(), Activation("tanh")),
        (nn.Sigmoid(), Activation("sigmoid")),
        (nn.GELU(), Activation("gelu")),
        (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
        (nn.Softplus(2.0, 10.0), Activation("softplus", (2.0, 10.0))),
        (nn.ELU(1.5), Activation("elu", (1.5,))),
    ],
)
def test_activations(activation: nn.Module, stage: Activation) -> None:
    chain = chain_of(nn.Sequential(nn.Linear(3, 3), activation), (3,))
    assert chain is not None
    assert chain.stages[1] in (stage, Activation("relu6"))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


MODELS = {
    "convolutional": (lambda: convolutional(nn.Tanh()), (2, 12, 11)),
    "product": (lambda: nn.Sequential(nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 2)), (5,)),
    "global mean": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), Mean(), nn.Linear(3, 2)), (2, 5, 6)),
    "adaptive pool": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.AdaptiveAvgPool1d(2), nn.Flatten()),
        (2, 6),
    ),
    "overlapping pools": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, dilation=2),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        ),
        (2, 10, 9),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_are_the_function(name: str) -> None:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = randomised(make()).double()
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    plan = Plan.trace(model, x)
    chain = plan.chain
    assert chain is not None
    weights, biases = chain.parameters(plan.resolve(model.state_dict()), plan.constants)
    spectral, frobenius = chain_jacobian_norms(x, [weights], [biases], chain.stages)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda s: model(s[None])[0]))(x)
    matrices = jacobian.reshape(4, -1, x[0].numel())
    torch.testing.assert_close(spectral[0], torch.linalg.matrix_norm(matrices, 2))
    torch.testing.assert_close(frobenius[0], torch.linalg.matrix_norm(matrices))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ((nn.ReLU(),), (3,)),
        ((nn.Linear(3, 3), nn.Softmax(1)), (3,)),
        ((nn.Linear(3, 3),), (2, 3)),
        ((nn.Conv2d(2, 2, 3, padding="same"),), (2, 5, 5)),
        ((nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),), (2, 5, 5)),
        ((nn.Conv2d(2, 2, 3), nn.AdaptiveAvgPool2d(2)), (2, 5, 5)),
        ((nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3, padding=1)), (2, 5, 5)),
        ((nn.ConvTranspose2d(2, 2, 3),), (2, 5, 5)),
    ],
)
def test_other_graphs_are_not_chains(layers: tuple[nn.Module, ...], shape: tuple[int, ...]) -> None:
    assert chain_of(nn.Sequential(*layers), shape) is None


class Transposed(nn.Module):
    """``x @ W``; its weight is a parameter, or computed from one, exactly or with a rounding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.randn(3, 4)), kind

    def forward(self, x: Tensor) -> Tensor:
        weight = {
            "plain": lambda: self.weight,
            "flipped": lambda: self.weight.flip(0),
            "scaled": lambda: self.weight * 0.3,
        }[self.kind]()
        return x @ weight


@pytest.mark.parametrize(
    ("model", "shape", "taken"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU6(), nn.Hardtanh()), (3,), True),
        (nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.LeakyReLU(-0.5)), (2, 3), True),
        (nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)), (2, 3), True),
        (Transposed("plain"), (3,), True),
        (Transposed("flipped"), (3,), True),
        (Transposed("scaled"), (3,), False),  # a rounding
        (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), (3,), False),  # folded: roundings
        (nn.Sequential(nn.Linear(3, 3), nn.Tanh()), (3,), False),
        (nn.Sequential(nn.Conv1d(2, 2, 1), nn.Flatten(), nn.Linear(6, 3)), (2, 3), False),
        (nn.Linear(3, 3), (2, 3), False),
    ],
)
def test_piecewise_linear_chains(model: nn.Module, shape: tuple[int, ...], *, taken: bool) -> None:
    plan = Plan.trace(model.eval(), torch.zeros(2, *shape))
    assert (plan.piecewise_linear_chain is not None) == taken


def test_which_of_several_networks_cannot_be_folded() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()).eval(), torch.ones(2, 4)
    plan, fine = Plan.trace(model, x), dict(model.state_dict())
    wrong = {**fine, "1.running_var": torch.tensor([1.0, -1.0, 1.0])}
    with pytest.raises(NonFiniteError, match=r"^state dict 2: BatchNorm with '1\.running_var'"):
        plan.lower([fine, fine, wrong], x)
    with pytest.raises(NonFiniteError, match=r"^BatchNorm with '1\.running_var'"):
        plan.lower(wrong, x)
