from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from experiments.analysis.patterns import (
    MOST_UNITS,
    OneHiddenLayer,
    every_pattern_has_an_input,
    input_of,
    largest_pattern,
    smoothed_ascent,
)
from lipfast.errors import ArgumentError


def _network(units: int, inputs: int, seed: int = 0) -> tuple[nn.Sequential, OneHiddenLayer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, 3)).double()
    network = OneHiddenLayer.of(model)
    assert network is not None
    return model, network


def _jacobian_norm(model: nn.Module, x: torch.Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(model, x)
    return float(torch.linalg.matrix_norm(jacobian, ord=2))


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_pattern_is_the_largest_of_all_and_an_input_has_it(seed: int) -> None:
    model, network = _network(6, 8, seed)
    norm, pattern = largest_pattern(network)
    all_of_them = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).double()
    matrices = network.outer @ (all_of_them.unsqueeze(2) * network.inner)
    assert norm == pytest.approx(float(torch.linalg.matrix_norm(matrices, ord=2).max()))
    assert every_pattern_has_an_input(network)
    point = input_of(network, pattern)
    assert ((network.inner @ point + network.bias > 0).double() == pattern).all()
    assert _jacobian_norm(model, point) == pytest.approx(norm)


def test_more_units_than_inputs_have_patterns_without_an_input() -> None:
    assert not every_pattern_has_an_input(_network(4, 3)[1])
    model, _ = _network(4, 8)
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[0] - 2 * model[0].weight[1]
    dependent = OneHiddenLayer.of(model)
    assert dependent is not None
    assert not every_pattern_has_an_input(dependent)


def test_the_ascent_climbs_and_never_above_the_truth() -> None:
    for seed in range(5):
        model, network = _network(10, 12, seed)
        starts = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
        before = max(_jacobian_norm(model, x.double()) for x in starts)
        points = smoothed_ascent(network, starts)
        assert torch.equal(points, smoothed_ascent(network, starts))
        after = max(_jacobian_norm(model, x) for x in points)
        assert before < after <= largest_pattern(network)[0] * (1 + 1e-12)


def test_other_networks_are_none() -> None:
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]
    assert OneHiddenLayer.of(nn.Sequential(*layers[:2])) is None
    assert OneHiddenLayer.of(nn.Sequential(*layers, nn.ReLU())) is None
    assert OneHiddenLayer.of(nn.ModuleList(layers)) is None
    without = OneHiddenLayer.of(nn.Sequential(nn.Linear(3, 4, bias=False), *layers[1:]))
    assert without is not None
    assert without.bias.tolist() == [0] * 4


def test_too_many_units_are_refused() -> None:
    with pytest.raises(ArgumentError, match=rf"at most {MOST_UNITS} units"):
        largest_pattern(_network(MOST_UNITS + 1, 20)[1])
