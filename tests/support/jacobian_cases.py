"""Models and explicit Jacobians that several tests use."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "elu": nn.ELU,
}


def perceptron(*widths: int, activation: str = "tanh", seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def small_convolutional(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, stride=2),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 7, 2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(7, 4),
    )


def samples(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """Explicit Jacobians (B, K, D) in float64, by `torch.func`."""
    training = [module.training for module in model.modules()]
    state = {name: value.double() for name, value in model.state_dict().items()}
    model.eval()

    def function(sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (sample[None],))[0].flatten()

    rows = torch.func.vmap(torch.func.jacrev(function))(x.double())
    for module, flag in zip(model.modules(), training, strict=True):
        module.training = flag
    return rows.reshape(len(x), rows.shape[1], -1).detach()


def norms(model: nn.Module, x: Tensor, norm: float = 2) -> Tensor:
    value: Tensor = torch.linalg.matrix_norm(jacobians(model, x), norm)
    return value
