from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.analysis.bias_variance import (
    SeedAverage,
    decompose,
    seed_averaged_norms,
    variance_at,
    variance_bound,
)
from lipfast.errors import ArgumentError


def _linear(weight: torch.Tensor, bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.fill_(bias)
    return layer.eval()


def test_loss_is_bias_plus_variance(generator: torch.Generator) -> None:
    outputs = torch.randn(4, 50, 3, generator=generator)
    targets = torch.randn(50, 3, generator=generator)
    parts = decompose(outputs, targets)
    assert parts.loss == pytest.approx(parts.bias + parts.variance)
    mean = outputs.double().mean(0)
    assert parts.variance == pytest.approx(
        float((outputs - mean).square().sum(2).mean(0).mean()), rel=1e-6
    )
    assert decompose(outputs[:1], targets).variance == 0
    with pytest.raises(ArgumentError, match="seeds, samples, classes"):
        decompose(outputs, targets[:3])


def test_the_ensemble_of_linear_maps_is_their_mean(generator: torch.Generator) -> None:
    first, second = torch.randn(2, 3, 5, generator=generator)
    x = torch.randn(7, 5, generator=generator)
    models = [_linear(first), _linear(second)]
    norms = seed_averaged_norms(models, x)
    expected = float(torch.linalg.matrix_norm(((first + second) / 2).double(), 2))
    assert norms.tolist() == pytest.approx([expected] * 7, rel=1e-5)
    torch.testing.assert_close(SeedAverage(models)(x), x @ ((first + second) / 2).T)
    with pytest.raises(ArgumentError):
        SeedAverage([])


def test_the_bound_holds_for_affine_networks(generator: torch.Generator) -> None:
    weights = torch.randn(4, 3, 5, generator=generator)
    models = [_linear(weight, bias=0.1 * k) for k, weight in enumerate(weights)]
    x = torch.randn(200, 5, generator=generator) + 1
    with torch.no_grad():
        outputs = torch.stack([model(x) for model in models])
    variance = decompose(outputs, torch.zeros(200, 3)).variance
    norms = torch.linalg.matrix_norm(weights.double(), 2).tolist()
    ensemble = float(torch.linalg.matrix_norm(weights.double().mean(0), 2))
    at_zero = variance_at(models, torch.zeros(5))
    assert at_zero == pytest.approx(3 * (0.01 * (0 + 1 + 4 + 9) / 4 - 0.15**2))
    bound = variance_bound(ensemble, norms, x, at_zero)
    assert bound >= variance
    centred = variance_bound(ensemble, norms, x, variance_at(models, x.mean(0)), around="mean")
    assert bound > centred >= variance


def test_arguments_of_the_bound(generator: torch.Generator) -> None:
    x = torch.randn(3, 2, generator=generator)
    with pytest.raises(ArgumentError, match="at least one seed"):
        variance_bound(1.0, [], x, 0.0)
    with pytest.raises(ArgumentError, match="around"):
        variance_bound(1.0, [1.0], x, 0.0, around="median")
