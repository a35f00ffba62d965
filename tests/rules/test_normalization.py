"""Normalisations: by stored statistics exact, by the sample's never exceeded, nearly attained."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from lipfast.errors import StateDictError
from lipfast.estimators.plan import Plan
from tests.support.explicit import Function, check_enclosure, check_linear, check_quotients, traced
from tests.support.networks import randomised

STORED = {
    "batch norm": (nn.BatchNorm1d(5), (5,)),
    "batch norm of images": (nn.BatchNorm2d(3), (3, 4, 2)),
    "batch norm of volumes": (nn.BatchNorm3d(2), (2, 2, 3, 2)),
    "without weights": (nn.BatchNorm1d(4, affine=False), (4, 3)),
    "instance norm": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 4, 2)),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_statistics_make_a_diagonal_map(name: str) -> None:
    layer, shape = STORED[name]
    check_linear(randomised(layer), shape, digits=1e-13)


SAMPLE = {
    "layer norm": (nn.LayerNorm(6), (6,)),
    "layer norm over two axes": (nn.LayerNorm((2, 3)), (4, 2, 3)),
    "group norm": (nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "rms norm": (nn.RMSNorm(6, eps=1e-2), (2, 6)),
    "rms norm of one entry": (nn.RMSNorm(1, eps=1e-2), (1,)),
    "rms norm of two entries": (nn.RMSNorm(2, eps=1e-2), (2,)),
    "layer norm without weights": (nn.LayerNorm(5, elementwise_affine=False), (5,)),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_quotients_stay_below_and_rounding_errors_are_enclosed(name: str) -> None:
    layer, shape = SAMPLE[name]
    layer = randomised(layer)
    plan = traced(layer, shape)
    check_quotients(plan, layer, shape, scales=(1e-3, 0.1, 1.0))
    check_enclosure(plan, layer, shape, 1e-12)


@pytest.mark.parametrize("count", [2, 3, 10, 100])
@pytest.mark.parametrize("centred", [True, False])
def test_constants_of_norms_1_and_inf_are_nearly_attained(count: int, centred: bool) -> None:
    layer = nn.LayerNorm(count) if centred else nn.RMSNorm(count, eps=1e-5)
    plan = traced(layer, (count,))
    # One entry stands out by the angle of the proof, the signs of the others alternate.
    angle = (math.pi - math.atan(math.sqrt(count - 1))) / 2
    direction = math.sin(angle) / math.sqrt(count - 1) * (-1.0) ** torch.arange(count).double()
    direction[0] = math.cos(angle)
    direction = direction - direction.mean() if centred else direction
    layer.requires_grad_(False)
    radii = torch.cat([torch.zeros(1), torch.logspace(-4, 0, 100)]).double()
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(radii[:, None] * direction)
    for norm in (1, math.inf):
        largest = float(torch.linalg.matrix_norm(jacobians, norm).max())
        bound = plan.upper(layer.state_dict(), norm=norm).value
        assert (0.75 if centred else 0.99) * bound <= largest <= bound * (1 + 1e-12)


def test_the_euclidean_constant_is_attained_at_a_constant_sample() -> None:
    layer = nn.LayerNorm(5).double().requires_grad_(False)
    jacobian = torch.func.jacrev(layer)(torch.ones(5).double())
    bound = Plan.trace(layer, torch.zeros(2, 5).double()).upper(layer.state_dict())
    assert float(torch.linalg.matrix_norm(jacobian, 2)) == pytest.approx(bound.value, rel=1e-9)


def test_a_single_centred_entry_is_constant() -> None:
    plan = Plan.trace(nn.LayerNorm(1), torch.zeros(2, 4, 1))
    assert plan.upper(nn.LayerNorm(1).state_dict()).value == 0.0


def test_without_eps_there_is_no_constant() -> None:
    plan = Plan.trace(nn.LayerNorm(3, eps=0.0, elementwise_affine=False), torch.zeros(2, 3))
    bound = plan.upper({})
    assert bound.value == math.inf
    assert "eps = 0" in (bound.reason or "")


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_rms_norm_without_an_eps_takes_that_of_its_dtype(dtype: torch.dtype) -> None:
    """Half precision runs in float32: its eps is measured from the slope near 0."""
    layer = nn.RMSNorm(4, dtype=dtype)
    x = torch.full((2, 4), 2.0**-14, dtype=dtype)
    slope = float((layer(x) / x).detach().double().max())
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(precision).eps
    assert slope == pytest.approx((eps + 2.0**-28) ** -0.5, rel=1e-2)
    for model in (layer, nn.Sequential(layer, nn.ReLU(inplace=True))):
        bound = Plan.trace(model, x).upper(model.state_dict())
        assert bound.certified
        assert bound.value == pytest.approx(1 / math.sqrt(eps))
        assert bound.value >= slope


def test_a_plan_whose_eps_is_of_another_dtype_is_refused(tmp_path: Path) -> None:
    """eps of float32 bounds the slope of a float64 module by 2896, which is 6.7e7."""
    single, double = nn.RMSNorm(3), nn.RMSNorm(3, dtype=torch.float64)
    plans = {
        torch.float32: Plan.trace(single, torch.zeros(2, 3)),
        torch.float64: Plan.trace(double, torch.zeros(2, 3, dtype=torch.float64)),
    }
    plans[torch.float32].save(tmp_path / "plan.json")
    for plan in (plans[torch.float32], Plan.load(tmp_path / "plan.json")):
        with pytest.raises(StateDictError, match="float64"):
            plan.upper(double.state_dict())
    with pytest.raises(StateDictError, match="not float64"):
        plans[torch.float64].upper(single.state_dict())
    for layer in (single, nn.RMSNorm(3).half(), nn.RMSNorm(3).bfloat16()):
        assert plans[torch.float32].upper(layer.state_dict()).value == pytest.approx(2.0**11.5)
    given = nn.RMSNorm(3, eps=1e-2)
    plan = Plan.trace(given, torch.zeros(2, 3))
    assert plan.upper(given.double().state_dict()).value == pytest.approx(10.0)


def test_statistics_of_a_batch_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="mixes the samples"):
        Plan.trace(nn.BatchNorm1d(3, track_running_stats=False).eval(), torch.zeros(2, 3))
    model = Function(lambda x: functional.layer_norm(x[:, None], (3,))[:, 0])
    assert Plan.trace(model, torch.zeros(2, 3)).upper({}).value == pytest.approx(1e5**0.5)
