"""Functions that are no modules: what mixes samples, is random or alters gradients is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.input_gradient import input_gradient_norms
from tests.support.jacobian_cases import perceptron, samples, small_convolutional

MODEL = perceptron(6, 9, 4).eval()
LABELS = torch.arange(8) % 4
TRAINING = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
GENERATOR = torch.Generator()

MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": lambda x: (MODEL(x) - MODEL(x).mean(0)).square().sum(1),
    "training mode": lambda x: TRAINING(x).square().sum(1),
    "condition": lambda x: x.sum(1) if x[1::2].sum() > 0 else x.square().sum(1),
    "softmax": lambda x: MODEL(x).softmax(0)[:, :1],
    "earlier ones": lambda x: x.cumsum(0).sum(1),
    "a neighbour": lambda x: x.sum(1) + 0.1 * x.roll(1, 0).sum(1),
}
RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: functional.dropout(MODEL(x)).sum(1),
    "noise": lambda x: MODEL(x + torch.randn_like(x)).sum(1),
    "own generator": lambda x: x.sum(1) + torch.rand(len(x), generator=GENERATOR),
}
ALTERED: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: MODEL(x).sum(1) + x.detach().sum(1),
    "scaled loss": lambda x: MODEL(x).sum(1) * MODEL(x).detach().sum(1),
    "numpy": lambda x: MODEL(x).sum(1) + torch.from_numpy(x.detach().numpy() ** 2).sum(1),
    "rounded": lambda x: (x + (x.round() - x).detach()).sum(1),
}


def cross_entropy(x: Tensor) -> Tensor:
    return functional.cross_entropy(MODEL(x), LABELS, reduction="none")


def energy(x: Tensor) -> Tensor:
    """A norm of a gradient, which needs samples that are recorded."""
    (gradient,) = torch.autograd.grad(MODEL(x).square().sum(), x, create_graph=True)
    return gradient.square().sum(1)


HONEST: dict[str, Callable[[Tensor], Tensor]] = {
    "cross entropy": cross_entropy,
    "margin": lambda x: MODEL(x)[:, 0] - MODEL(x)[:, 1],
    "largest": lambda x: MODEL(x).amax(1),
    "weights": lambda x: x.abs().sum(1) * torch.linspace(0, 5, 8),
    "kinks": lambda x: (x.relu() - (-x).relu()).sum(1),
    "energy": energy,
    "curved": lambda x: (300 * x).sin().sum(1),
    "constant": lambda x: 0 * x.sum(1) + 1,
    "relu": lambda x: (x - 1).relu().sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_is_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match=r"mixes the samples.*reduction='none'"):
        input_gradient_norms(MIXES[name], samples(8, 6))


@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_refused(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ArgumentError, match="when it is evaluated again"):
        input_gradient_norms(RANDOM[name], samples(8, 6))


@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("name", ALTERED)
def test_altered_gradients_are_refused(name: str, count: int) -> None:
    for x in (samples(count, 6), samples(count, 6).double()):
        if x.dtype == torch.float64:
            MODEL.double()
        try:
            with pytest.raises(ArgumentError, match="not that of the function"):
                input_gradient_norms(ALTERED[name], x)
        finally:
            MODEL.float()


@pytest.mark.parametrize("name", HONEST)
def test_honest_functions_pass(name: str) -> None:
    for x in (samples(8, 6), 1e-3 * samples(8, 6), 30 * samples(8, 6), torch.zeros(8, 6)):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(HONEST[name](leaf).sum(), leaf)
        found = input_gradient_norms(HONEST[name], x)
        torch.testing.assert_close(found, gradient.norm(dim=1))


def test_images_with_black_pixels_pass() -> None:
    model = small_convolutional().eval()
    x = samples(5, 2, 8, 8).relu()
    x[:, :, :4] = 0
    labels = torch.arange(5) % 4
    loss = nn.CrossEntropyLoss(reduction="none")
    assert input_gradient_norms(lambda x: loss(model(x), labels), x).shape == (5,)


def test_the_generator_is_where_one_evaluation_leaves_it() -> None:
    def function(x: Tensor) -> Tensor:
        torch.rand(3)
        return x.sum(1)

    torch.manual_seed(0)
    torch.rand(3)
    expected = torch.get_rng_state()
    torch.manual_seed(0)
    input_gradient_norms(function, samples(4, 3))
    assert torch.equal(torch.get_rng_state(), expected)
