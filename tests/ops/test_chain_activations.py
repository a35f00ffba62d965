"""Activations one by one, over the whole range of their arguments."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lipfast.ops.chain_activations import ACTIVATIONS as TABLE
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.reference.chain_jacobian_norms import chain_jacobian_norms as reference
from tests.support.chain_cases import ACTIVATIONS

DTYPES = [torch.float32, torch.float64]
CLAMPED = ("relu", "leaky_relu", "relu6", "hardtanh", "tanh", "sigmoid", "softplus", "elu")
ELU = Activation("elu", (1.0,))


KERNELS = Path(__file__).parents[2] / "csrc/kernels"


def enumerators(name: str) -> dict[str, int]:
    """Of the one `enum class` of this name in the kernels' headers."""
    definition = re.compile(rf"enum class {name}\b[^{{]*{{(.*?)}}", re.DOTALL)
    headers = [path.read_text() for path in KERNELS.rglob("*.h")]
    (body,) = [found for text in headers for found in definition.findall(text)]
    entries = re.findall(r"(\w+)\s*=\s*(\d+)", re.sub(r"//.*", "", body))
    return {entry: int(code) for entry, code in entries}


def test_kernels_number_the_same_activations() -> None:
    kernels = enumerators("Activation")
    python = {"k" + name.replace("_", ""): entry.code for name, entry in TABLE.items()}
    assert {name.lower(): code for name, code in kernels.items()} == python
    assert sorted(python.values()) == list(range(len(python)))


def test_kernels_evaluate_every_activation() -> None:
    """The one switch that has a case for each."""
    body = (KERNELS / "cpu/chain_activations-inl.h").read_text()
    assert set(re.findall(r"case Activation::(\w+):", body)) == set(enumerators("Activation"))


def test_every_activation_is_tested() -> None:
    assert {activation.name for activation in ACTIVATIONS} == set(TABLE)
    assert all(len(a.parameters) == len(TABLE[a.name].parameters) for a in ACTIVATIONS)


def arguments(dtype: torch.dtype) -> Tensor:
    """Zero, either end of every range, and what lies between; not a multiple of any vector."""
    small = torch.logspace(-30, 2, 401, dtype=torch.float64)
    near = torch.linspace(-35, 35, 1601, dtype=torch.float64)
    return torch.cat([small, -small, near, torch.zeros(1)]).to(dtype)[:, None]


def slopes(x: Tensor, stages: list[Stage], *scales: float) -> Tensor:
    """|derivative| (B,) of a chain of activations and factors."""
    weights = [torch.full((1, 1), scale, dtype=x.dtype) for scale in scales]
    return chain_jacobian_norms(x, [weights], [[None] * len(weights)], stages)[0][0]


def true_slopes(x: Tensor, stages: list[Stage], *scales: float) -> Tensor:
    weights = [torch.full((1, 1), scale, dtype=torch.float64) for scale in scales]
    return reference(x.double(), [weights], [[None] * len(weights)], stages)[0][0]


def assert_accurate(got: Tensor, truth: Tensor, x: Tensor) -> None:
    """To a few roundings: as many more as the logarithm says, which is an exponential's argument.

    GELU's and SiLU's derivatives pass through zero between -3 and 0. torch's sigmoid underflows
    some powers of ten above the least normal number.
    """
    unit = torch.finfo(got.dtype)
    logarithm = truth.clamp_min(unit.tiny).log().abs()
    allowed = unit.eps * truth * (16 + 8 * logarithm) + 1e4 * unit.tiny
    allowed += 4 * unit.eps * (x.double().abs() < 3)
    wrong = (got.double() - truth).abs() > allowed
    assert not bool(wrong.any()), (x[wrong][:5], got[wrong][:5], truth[wrong][:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_derivatives(capability: str, dtype: torch.dtype, activation: Activation) -> None:
    x = arguments(dtype)
    if activation.name == "tanh":  # the reference's 1 - tanh^2 cancels
        truth = x[:, 0].double().cosh().square().reciprocal()
    else:
        truth = true_slopes(x, [activation, Linear()], 1.0)
    assert_accurate(slopes(x, [activation, Linear()], 1.0), truth, x[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_values(capability: str, dtype: torch.dtype, activation: Activation) -> None:
    """Through elu'(-|a|) = exp(-|a|), for values of either sign."""
    x = arguments(dtype)
    x = x[x.abs()[:, 0] < 20]
    for scale in (-1.0, 1.0):
        stages: list[Stage] = [activation, Linear(), ELU, Linear()]
        truth = true_slopes(x, stages, scale, 1.0)
        if activation.name == "tanh":
            y = x[:, 0].double()
            truth = (scale * y.tanh()).clamp_max(0).exp() / y.cosh().square()
        assert_accurate(slopes(x, stages, scale, 1.0), truth, x[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a.name in CLAMPED], ids=str)
def test_infinite_arguments(capability: str, dtype: torch.dtype, activation: Activation) -> None:
    x = torch.tensor([[math.inf], [-math.inf], [torch.finfo(dtype).max]], dtype=dtype)
    truth = true_slopes(x, [activation, Linear()], 1.0).to(dtype)
    got = slopes(x, [activation, Linear()], 1.0)
    # inf * 0 in the product with the last layer's rows is not the activation's business.
    finite = truth.isfinite()
    assert torch.equal(got[finite], truth[finite])


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_stays_in_its_lane(capability: str, activation: Activation) -> None:
    x = torch.linspace(-4, 4, 37)[:, None].clone()
    clean = slopes(x, [activation, Linear()], 1.0)
    x[5] = math.nan
    got = slopes(x, [activation, Linear()], 1.0)
    assert bool(got[5].isnan())
    others = torch.arange(37) != 5
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [1, 7, 8, 15, 16, 17, 31, 33, 48])
def test_active_units_at_every_place(capability: str, dtype: torch.dtype, units: int) -> None:
    """One unit is active at a time; its row alone makes the Jacobian."""
    stages: list[Stage] = [Linear(), Activation("relu"), Linear(), Activation("relu"), Linear()]
    eye = torch.eye(units, dtype=dtype)
    rows = torch.arange(1.0, units + 1, dtype=dtype).diag()
    x = 2 * eye - 1
    weights = [[eye, rows, torch.ones(1, units, dtype=dtype)]]
    got = chain_jacobian_norms(x, weights, [[None] * 3], stages)[0][0]
    assert torch.equal(got, torch.arange(1.0, units + 1, dtype=dtype))
