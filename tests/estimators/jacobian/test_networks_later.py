"""Lower bounds by Lanczos on a device: two waits at most, and the values of the CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lipfast
from lipfast.errors import NonFiniteError
from lipfast.estimators.jacobian import lanczos_queued, linearization, networks_later
from lipfast.estimators.jacobian.linearization import Linearization
from lipfast.estimators.jacobian.networks_later import plan_norms_later
from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.stacked import StackedStateDicts
from tests.estimators.jacobian.test_lanczos import with_spectrum
from tests.support.pretended_device import CUDA, Counts, on_device, pretended_device

SIDE = 130
# More at the top than the first schedule tells apart.
CLUSTER = torch.cat([1 - 1e-4 * torch.arange(20), torch.linspace(0, 0.99, SIDE - 20)]).double()


@pytest.fixture(autouse=True)
def products_are_known() -> None:
    """The first look at how a device multiplies waits, once per process: no test counts it."""
    with pretended_device():
        assert products_are_ieee(CUDA)


@pytest.fixture(autouse=True)
def _few_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as these networks need: every operation of a pretended device takes its time."""
    if "all_steps" not in request.fixturenames:
        monkeypatch.setitem(lanczos_queued._STEPS_AT_FIRST, torch.float32, 28)
        monkeypatch.setattr(lanczos_queued, "_STEPS_AGAIN", 80)


@pytest.fixture
def all_steps() -> None:
    """The schedules as they are."""


def model_and_samples(*widths: int, count: int = 5) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval(), torch.randn(count, widths[0])


def state_dicts_of(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    return [
        {key: value * (1 + 0.1 * index) for key, value in model.state_dict().items()}
        for index in range(count)
    ]


def clustered(state_dicts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """With a Jacobian in the last network whose largest singular values lie near each other."""
    weight = next(key for key in state_dicts[-1] if key.endswith("weight"))
    state_dicts[-1][weight] = with_spectrum(CLUSTER).float()
    return state_dicts


def both_forms(state_dicts: list[dict[str, Tensor]]) -> list[Any]:
    stacked = {name: torch.stack([one[name] for one in state_dicts]) for name in state_dicts[0]}
    return [on_device(state_dicts), StackedStateDicts(on_device(stacked))]


def check_lower(
    plan: Any, networks: Any, x: Tensor, expected: list[Any], waits: int, **options: Any
) -> Counts:
    with pretended_device() as counts:
        found = plan.lower(networks, on_device(x), per_sample=True, **options)
        # A copy to the device waits, too, unless it is queued.
        assert counts.syncs == waits and not counts.blocking, counts.waits
        for one, other in zip(found, expected, strict=True):
            assert one.certified and one.value == pytest.approx(other.value, rel=1e-4)
            assert one.jacobian.value == pytest.approx(other.jacobian.value, rel=1e-5)
            torch.testing.assert_close(
                one.per_sample.cpu(), other.per_sample, rtol=1e-5, atol=0, check_device=False
            )
    return counts


@pytest.mark.usefixtures("all_steps")
def test_as_many_steps_as_there_are() -> None:
    model, x = model_and_samples(SIDE, SIDE)
    plan, state_dicts = lipfast.compile(model, x), clustered(state_dicts_of(model, 2))
    expected = plan.lower(state_dicts, x, per_sample=True)
    counts = check_lower(plan, on_device(state_dicts), x, expected, waits=2)
    assert counts.launches <= 7000


@pytest.mark.parametrize("count", [1, 2, 5])
def test_one_wait_for_any_number_of_state_dicts(count: int) -> None:
    model, x = model_and_samples(135, 132, SIDE)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, count)
    expected = plan.lower(state_dicts, x, per_sample=True)
    launches = [
        check_lower(plan, networks, x, expected, waits=1).launches
        for networks in both_forms(state_dicts)
    ]
    # Of a list, those that put its tensors together.
    assert max(launches) <= min(launches) + 2 * len(model.state_dict()) and max(launches) <= 1600


@pytest.mark.parametrize(("count", "form"), [(1, 0), (2, 1), (5, 0)])
def test_two_waits_where_there_must_be_more_steps(count: int, form: int) -> None:
    model, x = model_and_samples(SIDE, SIDE)
    plan, state_dicts = lipfast.compile(model, x), clustered(state_dicts_of(model, count))
    expected = plan.lower(state_dicts, x, per_sample=True)
    check_lower(plan, both_forms(state_dicts)[form], x, expected, waits=2)


def test_upper_and_lower_bounds_together() -> None:
    model, x = model_and_samples(SIDE, SIDE)
    plan, state_dicts = lipfast.compile(model, x), clustered(state_dicts_of(model, 3))
    expected = plan.bounds(state_dicts, x)
    with pretended_device() as counts:
        found = plan.bounds(on_device(state_dicts), on_device(x))
        assert counts.syncs <= 4 and not counts.blocking
    for one, other in zip(found, expected, strict=True):
        assert one.lower.value == pytest.approx(other.lower.value, rel=1e-4)
        assert one.lower.value <= one.upper.value


def test_blocks_of_networks_and_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory decides how many are looked at together, not how often the host waits."""
    model, x = model_and_samples(SIDE, SIDE, count=4)
    plan, state_dicts = lipfast.compile(model, x), clustered(state_dicts_of(model, 2))
    expected = plan.lower(state_dicts, x, per_sample=True)
    sizes: list[tuple[int, int]] = []
    interpreted, begin = networks_later.interpreted, Linearization.__init__

    def noted(plan: Any, tensors: Any, x: Tensor, checks: Any = None) -> Any:
        sizes.append((len(tensors), x.shape[1]))
        return interpreted(plan, tensors, x, checks)

    blocks: list[int] = []

    def begun(self: Linearization, function: Any, x: Tensor, checks: Any = None) -> None:
        blocks.append(len(x))
        begin(self, function, x, checks)

    monkeypatch.setattr(networks_later, "interpreted", noted)
    monkeypatch.setattr(Linearization, "__init__", begun)
    check_lower(plan, on_device(state_dicts), x, expected, waits=2, memory=600_000)
    # One network at a time, then one sample at a time.
    assert sizes == [(1, 4), (1, 4), (1, 4), (1, 4)] and blocks == [4, 4, 1, 1, 1, 1]


def test_some_samples_of_a_network_that_need_more_steps() -> None:
    """Where a unit is off, a cluster is left; the other samples have converged."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(with_spectrum(CLUSTER).float())
            self.gate = nn.Parameter(torch.ones(1))
            self.register_buffer("along", 3 * torch.eye(SIDE)[:1])

        def forward(self, x: Tensor) -> Tensor:
            top = torch.relu(self.gate * x[:, :1] * 1e3)
            return x @ self.weight + top * self.along

    torch.manual_seed(0)
    model, x = Gated().eval(), torch.randn(5, SIDE)
    x[:, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0])
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 2)
    expected = plan.lower(state_dicts, x, per_sample=True)
    with pretended_device():
        later = plan_norms_later(
            plan,
            plan.checked(on_device(state_dicts)),
            on_device(x),
            norm=2,
            memory=1 << 30,
        )
        assert later.fetched().unfinished() == {0: [1, 3], 1: [1, 3]}
    check_lower(plan, on_device(state_dicts), x, expected, waits=2)


def test_networks_that_overflow_single_precision() -> None:
    model, x = model_and_samples(SIDE, SIDE, SIDE)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 2)
    state_dicts[1] = {key: value * 1e25 for key, value in state_dicts[1].items()}
    expected = plan.lower(state_dicts, x)
    with pretended_device():
        found = plan.lower(on_device(state_dicts), on_device(x))
    for one, other in zip(found, expected, strict=True):
        assert one.jacobian.value == pytest.approx(other.jacobian.value, rel=1e-5)
    assert found[1].jacobian.value > 1e45


def test_numbers_that_are_not_finite_are_refused() -> None:
    model, x = model_and_samples(SIDE, SIDE, SIDE)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 3)
    state_dicts[1]["0.weight"][3, 4] = math.nan
    bad = x.clone()
    bad[3, 2] = math.inf
    for networks in both_forms(state_dicts):
        with (
            pretended_device(),
            pytest.raises(NonFiniteError, match=r"state dict 1: parameter '0.weight'"),
        ):
            plan.lower(networks, on_device(x))
    with pretended_device(), pytest.raises(NonFiniteError, match=r"1 of 5 samples.*sample 3"):
        plan.lower(on_device(state_dicts[:1]), on_device(bad))


def test_wrong_second_derivatives_lead_to_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_samples(SIDE, SIDE, count=2)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 2)
    expected = [bound.jacobian.value for bound in plan.lower(state_dicts, x)]
    jvp = Linearization.jvp
    monkeypatch.setattr(Linearization, "jvp", lambda self, v: 2 * jvp(self, v))
    with pretended_device():
        found = plan.lower(on_device(state_dicts), on_device(x))
    assert [bound.jacobian.value for bound in found] == pytest.approx(expected, rel=1e-5)


def test_rows_where_there_are_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_samples(SIDE, SIDE, count=2)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 2)
    expected = [bound.jacobian.value for bound in plan.lower(state_dicts, x)]

    def refused(self: Linearization, v: Tensor) -> Tensor:
        raise linearization.DerivativeError("none")

    monkeypatch.setattr(Linearization, "jvp", refused)
    with pretended_device() as counts:
        found = plan.lower(on_device(state_dicts), on_device(x))
        assert counts.syncs <= 2
    assert [bound.jacobian.value for bound in found] == pytest.approx(expected, rel=1e-5)


def test_samples_from_a_loader() -> None:
    """Looked at batch by batch, each at most twice."""

    def loader(x: Tensor) -> DataLoader[Any]:
        return DataLoader(TensorDataset(x), batch_size=3)

    model, x = model_and_samples(SIDE, SIDE, count=6)
    plan, state_dicts = lipfast.compile(model, x), state_dicts_of(model, 2)
    expected = plan.lower(state_dicts, loader(x), per_sample=True)
    with pretended_device() as counts:
        found = plan.lower(on_device(state_dicts), loader(on_device(x)), per_sample=True)
        assert counts.syncs <= 2 * 2 + 5, counts.waits
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one.per_sample.cpu(), other.per_sample, rtol=1e-5, atol=0, check_device=False
            )
