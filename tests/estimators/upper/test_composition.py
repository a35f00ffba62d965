"""Where log L comes from: the identity holds, shares are derivatives."""

from __future__ import annotations

import math

import pytest
import torch

import lipfast
from lipfast.estimators.upper.composition import Composition, Operation
from lipfast.rules.upward import Upward
from tests.support.two_layers import MODELS, TwoLayers, bound


def test_a_chain_is_its_layers_and_its_activations() -> None:
    upper = bound((3.0, 5.0), lambda x, a, b: b(torch.sigmoid(a(x))))
    sources = upper.sources
    assert sources is not None
    assert sources.layers == pytest.approx([math.log(3), math.log(5)], rel=1e-5)
    assert sources.other == pytest.approx(-math.log(4))
    assert sources.branches == pytest.approx(0.0, abs=1e-12)


def test_a_residual_block() -> None:
    upper = bound((3.0, 2.0), lambda x, a, b: b(x + a(x)))
    sources = upper.sources
    assert sources is not None
    assert upper.value == pytest.approx(8.0, rel=1e-5)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert sources.layers == pytest.approx([0.75 * math.log(3), math.log(2)], rel=1e-5)
    assert sources.branches == pytest.approx(entropy, rel=1e-5)


def test_a_concatenation_shares_squares() -> None:
    upper = bound((3.0, 4.0), lambda x, a, b: torch.cat([a(x), b(x)], 1))
    assert upper.value == pytest.approx(5.0, rel=1e-5)
    sources = upper.sources
    assert sources is not None
    assert sources.layers == pytest.approx([0.36 * math.log(3), 0.64 * math.log(4)], rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_sources_add_up_to_the_logarithm(name: str) -> None:
    model = TwoLayers((3.0, 4.0), MODELS[name])
    plan = lipfast.compile(model, torch.zeros(1, 4))
    for norm in (1, 2, math.inf):
        upper = plan.upper(model.state_dict(), norm=norm)
        sources = upper.sources
        assert sources is not None
        assert upper.composition is not None
        total = math.fsum([*sources.layers, sources.other, sources.branches])
        assert total == pytest.approx(upper.composition.total.log, abs=1e-9)
        assert upper.log_value <= upper.composition.total.log


@pytest.mark.parametrize("name", ["nested", "difference"])
def test_a_weight_is_a_derivative(name: str) -> None:
    """log L against the logarithm of one layer's norm."""
    step = 1e-3
    model = TwoLayers((3.0, 4.0), MODELS[name])
    plan = lipfast.compile(model, torch.zeros(1, 4))
    state = model.state_dict()
    larger = {**state, "a.weight": (1 + step) * state["a.weight"]}
    here, there = plan.upper([state, larger])
    slope = (there.log_value - here.log_value) / math.log1p(step)
    assert here.composition is not None
    index = next(layer.index for layer in here.layers if layer.name == "a")
    part = next(part for part in here.composition.parts.values() if part.layer == index)
    assert here.composition.weights[part.name] == pytest.approx(slope, abs=5e-3)


def test_unbounded_and_zero() -> None:
    unbounded = bound((3.0, 4.0), lambda x, a, b: a(x) * b(x))
    assert math.isinf(unbounded.value) and unbounded.sources is not None
    assert math.isnan(unbounded.sources.other)
    assert unbounded.log_shares == (None, None)
    zero = bound((0.0, 4.0), lambda x, a, b: b(torch.relu(a(x))))
    assert zero.value == 0.0 and zero.log_shares == (None, None)
    assert "0" in str(zero) and "0" in str(zero.explain())


def test_only_what_the_outputs_read_is_kept() -> None:
    one = Upward.of(1.0)
    names = ("x", "dead", "relu")
    operations = [Operation(name, "aten.relu", "", () if name == "x" else ("x",)) for name in names]
    found = Composition(operations, dict.fromkeys(names, one), {}, ("relu",), one)
    assert list(found.parts) == ["x", "relu"]
