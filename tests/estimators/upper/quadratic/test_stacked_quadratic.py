"""Quadratic constraints of chains on a device: true, proved, as tight as on the CPU, one wait."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, CertificateError
from lipfast.estimators.upper.quadratic import bounds as quadratic_bounds
from lipfast.estimators.upper.quadratic import stacked_quadratic
from lipfast.estimators.upper.quadratic.stacked_quadratic import ChainsOnDevice, ProvedLater
from lipfast.estimators.upper.quadratic.verify import verify_certificate
from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.stacked import StackedStateDicts
from tests.support.pretended_device import CUDA, on_device, pretended_device

QUADRATIC = "quadratic constraints"


@pytest.fixture(autouse=True)
def products_are_known() -> None:
    """The first look at how a device multiplies waits, once per process: no test counts it."""
    with pretended_device():
        assert products_are_ieee(CUDA)


def chain(activation: nn.Module, *sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), copy.deepcopy(activation)]
    return nn.Sequential(*modules[:-1])


def networks_of(model: nn.Module, count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: value * (1 + 0.3 * torch.randn(value.shape, generator=generator))
            for name, value in model.state_dict().items()
        }
        for _ in range(count)
    ]


def stacked(state_dicts: Sequence[dict[str, Tensor]]) -> StackedStateDicts:
    names = state_dicts[0]
    return StackedStateDicts(
        {name: on_device(torch.stack([own[name] for own in state_dicts])) for name in names}
    )


ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(-0.5), nn.PReLU(8, 0.4), nn.GELU(), nn.Hardswish(), nn.Sigmoid(),
    nn.ELU(1.5), nn.LeakyReLU(1.0),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_as_on_the_cpu_and_checked_again_there(activation: nn.Module) -> None:
    model = chain(activation, 6, 8, 8, 3)
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))
    plan, state_dicts = lipfast.compile(model, x), networks_of(model, 3)
    reached = plan.lower(state_dicts, x)
    for effort, near, form in ((1, 0.05, stacked), (2, 0.01, on_device)):
        known = plan.upper(state_dicts, method="quadratic", effort=effort)
        networks = form(state_dicts)
        with pretended_device() as counts:
            found = plan.upper(networks, method="quadratic", effort=effort)
            assert counts.syncs == 1 and not counts.blocking, counts.waits
        for one, other, below, own in zip(found, known, reached, state_dicts, strict=True):
            assert one.certified and one.method == QUADRATIC and one.certificate is not None
            assert below.value <= one.value <= other.value * (1 + near)
            assert verify_certificate(one.certificate, plan, own).value == one.value


def test_slopes_of_all_networks_and_of_each_in_one_chain() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.PReLU(7), nn.Linear(7, 5), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Linear(5, 3), nn.Tanh())
    plan, state_dicts = lipfast.compile(model, torch.zeros(1, 6)), networks_of(model, 3)
    known = plan.upper(state_dicts, method="quadratic")
    with pretended_device() as counts:
        found = plan.upper(stacked(state_dicts), method="quadratic")
        assert counts.syncs == 1 and not counts.blocking
    for one, other, own in zip(found, known, state_dicts, strict=True):
        assert one.value == pytest.approx(other.value, rel=5e-2)
        assert one.certificate is not None
        assert verify_certificate(one.certificate, plan, own).value == one.value


def corners(weights: Sequence[Tensor], ends: tuple[float, float]) -> float:
    """The largest norm over all slopes at the ends of their range."""
    sizes = [len(weight) for weight in weights[:-1]]
    largest = 0.0
    for choice in itertools.product(ends, repeat=sum(sizes)):
        slopes = torch.split(torch.tensor(choice, dtype=torch.float64), sizes)
        jacobian = weights[0]
        for weight, own in zip(weights[1:], slopes, strict=True):
            jacobian = (weight * own) @ jacobian
        largest = max(largest, float(torch.linalg.matrix_norm(jacobian, 2)))
    return largest


RANGES: list[tuple[nn.Module, tuple[float, float]]] = [
    (nn.ReLU(), (0.0, 1.0)),
    (nn.LeakyReLU(0.25), (0.25, 1.0)),
    (nn.LeakyReLU(-2.0), (-2.0, 1.0)),
    (nn.LeakyReLU(1.0), (1.0, 1.0)),
]


@pytest.mark.parametrize(("activation", "ends"), RANGES, ids=repr)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 3, 2), (3, 2, 3, 1), (1, 2, 2, 2, 2)])
def test_never_below_the_slopes_at_their_ends(
    activation: nn.Module, ends: tuple[float, float], sizes: tuple[int, ...]
) -> None:
    """Weights of many sizes, rows and columns of zeros; the quadratic bound without the product."""
    model = chain(activation, *sizes).double()
    plan, state_dicts = lipfast.compile(model, torch.zeros(1, sizes[0]).double()), []
    for index in range(12):
        generator = torch.Generator().manual_seed(index)
        own = {}
        for name, value in model.state_dict().items():
            size = 10.0 ** torch.randint(-12, 13, (1,), generator=generator).double()
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.dim() == 2 and index % 3 == 1:
                drawn[0] = 0.0
            if value.dim() == 2 and index % 3 == 2:
                drawn[:, 0] = 0.0
            own[name] = drawn * (size if index > 5 else 1.0)
        state_dicts.append(own)
    with pretended_device():
        queued = quadratic_bounds.queued_bounds(
            plan, *parts_of(plan, state_dicts), effort=1, start=[None] * 12, memory=1 << 30
        )
        assert queued is not None
        found = queued()
    assert not isinstance(found, str)
    proved = reached = 0
    for own, log in zip(state_dicts, found.logs, strict=True):
        truth = corners([value for value in own.values() if value.dim() == 2], ends)
        assert log >= (math.log(truth) if truth > 0 else -math.inf) - 1e-12
        reached += truth > 0
        proved += truth > 0 and log < math.log(truth) + 0.5
    assert proved >= 0.9 * reached > 0


def parts_of(plan: Any, state_dicts: list[dict[str, Tensor]]) -> tuple[Any, Any]:
    from lipfast.estimators.upper.sweep import sweep_of  # noqa: PLC0415 - beside what it is for
    from lipfast.plan.checked import resolve_later  # noqa: PLC0415

    return sweep_of(plan, plan.folded), resolve_later(plan, on_device(state_dicts)).networks


def test_launches_and_waits_do_not_depend_on_the_number_of_networks() -> None:
    model = chain(nn.ReLU(), 6, 8, 8, 3)
    plan, launches = lipfast.compile(model, torch.zeros(1, 6)), []
    for count in (2, 30):
        networks = stacked(networks_of(model, count))
        with pretended_device() as counts:
            plan.upper(networks, method="quadratic", effort=1)
            assert counts.syncs == 1 and not counts.blocking
        launches.append(counts.launches)
    assert launches[0] == launches[1] <= 4100


def test_batches_are_as_all_together_and_too_little_memory_is_told() -> None:
    model = chain(nn.GELU(), 6, 8, 5, 3)
    plan, state_dicts = lipfast.compile(model, torch.zeros(1, 6)), networks_of(model, 5)
    with pretended_device() as counts:
        networks = stacked(state_dicts)
        whole = plan.upper(networks, method="quadratic", effort=1)
        few = counts.launches
        counts.clear()
        parts = plan.upper(networks, method="quadratic", effort=1, memory=20_000)
        assert counts.syncs == 1 and counts.launches > 2 * few
        none = plan.upper(networks, method="quadratic", memory=1000)
        product = plan.upper(networks)
    values = [bound.value for bound in whole]
    assert [bound.value for bound in parts] == pytest.approx(values, rel=1e-3)
    assert [bound.value for bound in none] == [bound.value for bound in product]
    assert all("more than memory=1000" in str(bound.reason) for bound in none)


def test_what_is_not_finite_or_far_apart_is_left_to_the_product() -> None:
    model = chain(nn.ReLU(), 6, 8, 3)
    plan, (one, other, last) = lipfast.compile(model, torch.zeros(1, 6)), networks_of(model, 3)
    other["2.weight"] *= 0.0
    last = {name: value.double() * 1e100 for name, value in last.items()}
    for state_dicts in ([one, other], [last]):
        known = plan.upper(state_dicts, method="quadratic")
        with pretended_device():
            found = plan.upper(on_device(state_dicts), method="quadratic")
        for this, that in zip(found, known, strict=True):
            assert this.certified
            assert this.log_value == pytest.approx(that.log_value, rel=1e-3)


def test_trackers_start_from_the_multipliers_before() -> None:
    model = chain(nn.ReLU(), 6, 12, 12, 3)
    plan, run = lipfast.compile(model, torch.zeros(1, 6)), networks_of(model, 1)
    run += [{name: value * (1 + 0.01 * k) for name, value in run[0].items()} for k in range(1, 4)]
    cold = [bound.value for bound in plan.upper(run, method="quadratic", effort=1)]
    with pretended_device() as counts:
        tracker = plan.tracker(method="quadratic", effort=1)
        warm = []
        for state_dict in on_device(run):
            counts.clear()
            warm.append(tracker.upper(state_dict))
            assert counts.syncs <= 2
        assert tracker.multipliers is not None
        assert all(own.device == CUDA for own in tracker.multipliers)
    assert all(bound.certified for bound in warm)
    assert warm[-1].value < cold[-1] * 1.001


def test_starts_that_say_nothing() -> None:
    """NaN, infinities and numbers far away: what is found is as without."""
    chains = drawn_chains()
    found = ProvedLater(lambda _: chains, [slice(None)], evaluations=5).read()
    for number in (math.nan, math.inf, -math.inf, 1e6, -1e6):
        start = [torch.full((2, 4), number, dtype=torch.float64)]
        again = ProvedLater(lambda _: chains, [slice(None)], evaluations=5, start=start).read()
        assert torch.equal(found.squares, again.squares)


def drawn_chains(relative: float = 0.0) -> ChainsOnDevice:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 3), (2, 2, 4)]
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    half, zero = torch.full((1, 4), 0.5).double(), torch.zeros(1, 4).double()
    errors = [relative * weight.abs() if relative else None for weight in weights]
    return ChainsOnDevice(weights, errors, [half], [zero], [False])


def test_errors_of_weights_count() -> None:
    exact, off = (
        ProvedLater(lambda _: chains, [slice(None)], evaluations=20).read()  # noqa: B023
        for chains in (drawn_chains(), drawn_chains(1e-4))
    )
    assert bool((off.squares > exact.squares * (1 + 2e-4)).all())
    assert bool((off.squares < exact.squares * (1 + 1e-1)).all())


def test_nothing_is_proved_by_a_search_that_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it gives: too small multipliers or a too small maximum are refused."""
    chains, search = drawn_chains(), stacked_quadratic.stacked_search
    for shift in (-3.0, math.nan, math.inf, -800.0):
        monkeypatch.setattr(
            stacked_quadratic, "stacked_search", lambda *args, by=shift: search(*args) + by
        )
        found = ProvedLater(lambda _: chains, [slice(None)], evaluations=2).read()
        assert bool(found.squares.isinf().all())
    monkeypatch.setattr(stacked_quadratic, "stacked_search", search)
    largest = stacked_quadratic.log_largest
    monkeypatch.setattr(stacked_quadratic, "log_largest", lambda last: largest(last) - 1e-6)
    found = ProvedLater(lambda _: chains, [slice(None)], evaluations=2).read()
    assert bool(found.squares.isinf().all())


def test_certificates_of_a_device_say_no_more_than_was_proved() -> None:
    model = chain(nn.ReLU(), 4, 6, 2)
    plan, (state_dict,) = lipfast.compile(model, torch.zeros(1, 4)), networks_of(model, 1)
    with pretended_device():
        found = plan.upper(on_device(state_dict), method="quadratic")
    assert found.certificate is not None
    smaller = replace(found.certificate, square=found.certificate.square * (1 - 1e-6))
    with pytest.raises(CertificateError, match="not proved"):
        verify_certificate(smaller, plan, state_dict)


def test_products_of_shorter_numbers_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain(nn.ReLU(), 4, 6, 2)
    plan = lipfast.compile(model, torch.zeros(1, 4))
    monkeypatch.setattr(quadratic_bounds, "products_are_ieee", lambda _: False)
    with pretended_device():
        found = plan.upper(on_device(dict(model.state_dict())), method="quadratic")
    assert found.method != QUADRATIC and "shorter numbers" in str(found.reason)


def test_norms_that_have_no_quadratic_constraints() -> None:
    model = chain(nn.ReLU(), 4, 6, 2)
    plan = lipfast.compile(model, torch.zeros(1, 4))
    with pretended_device(), pytest.raises(ArgumentError, match="norm 2"):
        plan.upper(on_device(dict(model.state_dict())), norm=1, method="quadratic")
