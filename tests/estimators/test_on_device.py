"""Every public call with models and samples on a device: right, and how often the host waits.

The device is `tests.support.pretended_device`: CUDA's rules on a CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast import _native
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.jacobian.linearization import Linearization
from lipfast.estimators.upper.together import FEWEST
from lipfast.ops.emulation import products_are_ieee
from lipfast.plan import stacked as stacked_module
from lipfast.plan.convert import MAX_FOLDED_ENTRIES
from lipfast.plan.stacked import StackedStateDicts
from lipfast.rules import RULES
from tests.support.networks import randomised
from tests.support.pretended_device import (
    CUDA,
    Counts,
    Pretended,
    module_on_device,
    on_device,
    pretended_device,
)

NORMS = [1, 2, math.inf]


@pytest.fixture(autouse=True)
def products_are_known() -> None:
    """The first look at how a device multiplies waits, once per process: no test counts it."""
    with pretended_device():
        assert products_are_ieee(CUDA)


def mlp(*widths: int, between: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), between()]
    return nn.Sequential(*layers[:-1])


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + 0.5 * weight.triu(1).mT


def symmetric(layer: nn.Linear) -> nn.Module:
    return nn.utils.parametrize.register_parametrization(layer, "weight", Symmetric())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor([0.5, -1.0, 2.0, 1.0, 0.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.relu(x + self.scale * self.inner(x)))


class Gated(nn.Module):
    """A product of activations, a softmax with a mask, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(6, 4), nn.Linear(6, 4)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -math.inf, 0.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.softmax(self.gate(x) + self.mask, -1)
        return scores * torch.tanh(self.value(x)), self.value(x).abs()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        tokens = nn.functional.layer_norm(x, (4,))
        weights = self.query(tokens) @ self.key(tokens).mT
        return torch.softmax(weights / 2, -1) @ self.value(tokens)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (lambda: mlp(6, 8, 5), (6,)),
    "smooth": (lambda: mlp(6, 8, 5, between=nn.GELU), (6,)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv1d(1, 2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
        ),
        (1, 4),
    ),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), (6,)),
    "folded": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()), (6,)),
    "merged": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (6,)),
    "computed": (lambda: nn.Sequential(symmetric(nn.Linear(6, 6)), nn.GELU()), (6,)),
    "residual": (Residual, (6,)),
    "gated": (Gated, (6,)),
    "attention": (Attention, (3, 4)),
    "upsampled": (
        lambda: nn.Sequential(
            nn.ConvTranspose1d(1, 2, 2, stride=2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 3)
        ),
        (1, 3),
    ),
    "wide": (lambda: mlp(70, 30, 68), (70,)),
}

# Of these, those that are matrices with activations between them.
CHAINS = ("chain", "smooth", "wide")


def case(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(0)
    model = make()
    if name != "gated":
        randomised(model)
    return model.eval(), torch.randn(5, *shape)


def searches(model: nn.Module, x: Tensor, norm: float) -> dict[str, Callable[[], Any]]:
    few = {
        "convex": {"draws": 6},
        "neighbourhood": {"radius": 0.1, "draws": 3, "centres": 3},
        "ascent": {"steps": 2, "starts": 2},
        "pairs": {},
    }
    return {
        f"lower_bound {search}": lambda search=search, options=options: lipfast.lower_bound(
            model, x, norm=norm, search=search, **options
        )
        for search, options in few.items()
    }


def calls(model: nn.Module, plan: Any, x: Tensor, norm: float) -> dict[str, Callable[[], Any]]:
    """All public calls that take a model or a state dict."""
    state = dict(model.state_dict())
    box = lipfast.Box(-3.0, 3.0)
    made = {
        "jacobian_norms": lambda: lipfast.jacobian_norms(model, x, norm=norm),
        "jacobian_norms again": lambda: lipfast.jacobian_norms(model, x, norm=norm),
        "jacobian_norms rows": lambda: lipfast.jacobian_norms(model, x, norm=norm, method="rows"),
        "jacobian_norms streamed": lambda: lipfast.jacobian_norms(
            model, x[:1], norm=norm, method="rows", memory=1
        ),
        "jacobian_norms create_graph": lambda: lipfast.jacobian_norms(
            model, x, norm=norm, create_graph=True
        ),
        "input_gradient_norms": lambda: lipfast.input_gradient_norms(
            lambda z: flat(model(z)).square().sum(1), x, norm=norm
        ),
        "lower_bound": lambda: lipfast.lower_bound(model, x, norm=norm, domain=box),
        "upper_bound": lambda: lipfast.upper_bound(model, x, norm=norm, domain=box),
        "bounds": lambda: lipfast.bounds(model, x, norm=norm, per_sample=True),
        "plan.check": lambda: plan.check(state),
        "plan.upper": lambda: plan.upper(state, norm=norm, simplify=False),
        "plan.upper many": lambda: plan.upper([state] * 5, norm=norm),
        "plan.lower": lambda: plan.lower(state, x, norm=norm, domain=box),
        "plan.lower many": lambda: plan.lower([state] * 5, x, norm=norm),
        "plan.bounds": lambda: plan.bounds(state, x, norm=norm),
        "tracker": lambda: [
            tracker.upper(state) for tracker in [plan.tracker(norm=norm)] for _ in "ab"
        ],
        **searches(model, x, norm),
    }
    if norm == 2:
        made["jacobian_norms lanczos"] = lambda: (
            lipfast.jacobian_norms(model, x, method="lanczos", details=True).values
        )
        made["upper_bound quadratic"] = lambda: lipfast.upper_bound(model, x, method="quadratic")
        made["plan.upper quadratic"] = lambda: plan.upper([state] * 3, method="quadratic")
    return made


def flat(outputs: Any) -> Tensor:
    leaves = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([leaf.flatten(1) for leaf in leaves], 1)


def numbers(found: Any) -> list[Tensor]:
    """What a result holds, for comparison; tensors are where they were computed."""
    if isinstance(found, Tensor):
        return [found.detach()]
    if isinstance(found, (list, tuple)):
        return [number for entry in found for number in numbers(entry)]
    if isinstance(found, lipfast.Bounds):
        return [*numbers(found.lower), *numbers(found.upper)]
    if isinstance(found, lipfast.LowerBound):
        kept = [found.points.sum() * 0, *([] if found.per_sample is None else [found.per_sample])]
        return [torch.tensor([found.jacobian.value, found.mean, found.rms]), *kept]
    if isinstance(found, lipfast.UpperBound):
        return [torch.tensor([found.value, *(layer.upper for layer in found.layers)])]
    return []


# Of a call, at most so many launches, waits for the device, and copies to it. A trace is compared
# with its module first, on a dozen batches and in two precisions; most calls trace a model once.
COMPARISON = (700, 95, 32)
TRACING = ("jacobian_norms", "lower_bound", "upper_bound", "bounds", "upper_bound quadratic")
CEILINGS = {
    "jacobian_norms": (320, 75, 9),
    "jacobian_norms again": (320, 65, 9),
    "jacobian_norms rows": (450, 80, 9),
    "jacobian_norms streamed": (800, 80, 9),
    "jacobian_norms lanczos": (1500, 90, 9),
    "jacobian_norms create_graph": (550, 80, 10),
    "input_gradient_norms": (200, 6, 2),
    "lower_bound": (700, 60, 10),
    "lower_bound convex": (900, 80, 12),
    "lower_bound neighbourhood": (1300, 90, 17),
    "lower_bound ascent": (1500, 90, 20),
    "lower_bound pairs": (1000, 100, 12),
    "upper_bound": (180, 30, 2),
    "bounds": (600, 45, 4),
    "plan.check": (12, 1, 0),
    "plan.upper": (60, 2, 1),
    "plan.upper many": (40, 2, 1),
    "plan.lower": (420, 2, 3),
    "plan.lower many": (400, 2, 1),
    "plan.bounds": (600, 3, 3),
    "tracker": (300, 7, 3),
    "upper_bound quadratic": (6000, 30, 4),
    "plan.upper quadratic": (5700, 1, 3),
}


def check_calls(name: str, norm: float, chosen: Collection[str] | None = None) -> dict[str, Counts]:
    """Results are those of the CPU, where they belong; how much each call asks of the device."""
    model, x = case(name)
    plan = lipfast.compile(model, x)
    asked = {}
    here = calls(model, plan, x, norm)
    chosen = here.keys() if chosen is None else chosen
    known = {key: numbers(here[key]()) for key in chosen}
    with warnings.catch_warnings(), pretended_device() as counts:
        warnings.simplefilter("ignore")
        theirs = calls(module_on_device(model), plan, on_device(x), norm)
        for key, expected in known.items():
            call = theirs[key]
            counts.clear()
            found = numbers(call())
            asked[key] = replace(counts)
            for one, other in zip(found, expected, strict=True):
                values = one.cpu() if isinstance(one, Pretended) else one
                torch.testing.assert_close(values, other, rtol=3e-3, atol=1e-5, equal_nan=True)
            if key.startswith("jacobian_norms") or key == "input_gradient_norms":
                assert all(isinstance(one, Pretended) for one in found)
    return asked


@pytest.mark.parametrize("norm", NORMS)
def test_a_chain_in_every_call(norm: float) -> None:
    asked = check_calls("chain", norm)
    check_waits("chain", norm, asked)
    for key, counts in asked.items():
        found = (counts.launches, counts.syncs, counts.copies)
        compared = COMPARISON if key in TRACING else (0, 0, 0)
        above = [
            count > most + more
            for count, most, more in zip(found, CEILINGS[key], compared, strict=True)
        ]
        assert not any(above), f"{key}: {found}"


# At most so many waits, and for each tensor of the model so many more. A module is looked at
# before and after each evaluation, tensor by tensor.
WAITS = {
    "input_gradient_norms": (6, 0),
    "lower_bound": (20, 5),
    "lower_bound pairs": (22, 11),
    "upper_bound": (10, 0),
    "bounds": (16, 0),
    "plan.check": (2, 0),
    "plan.upper": (2, 0),
    "plan.upper many": (2, 0),
    "plan.lower": (2, 0),
    "plan.lower many": (2, 0),
    "plan.bounds": (3, 0),
    "tracker": (5, 0),
    "upper_bound quadratic": (10, 0),
    "plan.upper quadratic": (1, 0),
    **dict.fromkeys(
        (f"lower_bound {kind}" for kind in ("convex", "neighbourhood", "ascent")), (20, 8)
    ),
}
WAITS_OF_NORMS, WAITS_OF_TRACING = (40, 9), (60, 28)
# The case has no slope around its samples: where it jumps is sought by bisection.
WAITS_OF_CONSTANTS = 110


def check_waits(name: str, norm: float, asked: Mapping[str, Counts]) -> None:
    """A copy to the device waits, too, unless it is queued."""
    model, x = case(name)
    tensors = len(model.state_dict())
    searched = norm == 2 and any(
        layer.convolution is not None for layer in lipfast.compile(model, x).layers
    )
    for key, counts in asked.items():
        if searched and ("upper" in key or "bounds" in key or key == "tracker"):
            continue  # levels of a search over convolutions' symbols are looked at
        if "quadratic" in key and name not in CHAINS:
            continue  # networks that are no chains are searched for one by one, step by step
        of_norms = key.startswith("jacobian_norms")
        fixed, each = WAITS_OF_NORMS if of_norms else WAITS[key]
        if key in TRACING:
            fixed, each = fixed + WAITS_OF_TRACING[0], each + WAITS_OF_TRACING[1]
        if of_norms and name == "convolutional":
            fixed += WAITS_OF_CONSTANTS
        assert counts.syncs + counts.blocking <= fixed + each * tensors, (key, counts)


@pytest.mark.parametrize("name", [name for name in CASES if name != "chain"])
def test_other_models(name: str) -> None:
    chosen = ("jacobian_norms", "lower_bound", "upper_bound", "plan.lower many", "plan.upper")
    tight = ("plan.upper quadratic",) if name in (*CHAINS, "residual") else ()
    check_waits(name, 2, check_calls(name, 2, (*chosen, *tight)))


@pytest.mark.long
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "chain"])
def test_every_model_in_every_call(name: str, norm: float) -> None:
    check_waits(name, norm, check_calls(name, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["chain", "smooth"])
def test_the_host_waits_twice_for_any_number_of_state_dicts(name: str, norm: float) -> None:
    model, x = case(name)
    plan = lipfast.compile(model, x)
    samples, seen = on_device(x), []
    for count in (4, 40):
        state_dicts = [on_device(dict(model.state_dict())) for _ in range(count)]
        stacked = StackedStateDicts(
            {
                key: on_device(value.expand(count, *value.shape))
                for key, value in model.state_dict().items()
            }
        )
        for networks in (state_dicts, stacked):
            with pretended_device() as counts:
                upper = plan.upper(networks, norm=norm)
                assert counts.syncs <= 2
                seen.append(counts.launches)
                counts.clear()
                if name == "chain" and norm == 2:
                    lower = plan.lower(networks, samples, norm=norm)
                    assert counts.syncs <= 2
                    seen[-1] += counts.launches
                    assert lower[0].points.device == CUDA
                    assert all(a.value <= b.value for a, b in zip(lower, upper, strict=True))
                assert len({bound.value for bound in upper}) == 1
    # A kernel of torch's takes 128 tensors.
    assert max(seen) <= min(seen) + 16


def many(count: int, dtype: torch.dtype) -> tuple[Any, list[dict[str, Tensor]], Tensor]:
    """A plan of 40-256-256-10, as many state dicts of it, and samples."""
    torch.manual_seed(0)
    model, x = mlp(40, 256, 256, 10), torch.randn(5, 40)
    state_dicts = [
        {key: (value * (1 + 0.01 * index)).to(dtype) for key, value in model.state_dict().items()}
        for index in range(count)
    ]
    return lipfast.compile(model, x), state_dicts, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_launches_of_lower_bounds_do_not_grow_with_the_number_of_state_dicts(
    dtype: torch.dtype,
) -> None:
    """Beside `most`, of half types a conversion per parameter, and a list is brought together."""
    most, converted, listed = 18, (0 if dtype == torch.float32 else 16), 6
    for count in (30, 90):
        plan, state_dicts, x = many(count, dtype)
        expected = [bound.value for bound in plan.lower(state_dicts, x)]
        there = on_device(state_dicts)
        stacked = StackedStateDicts(
            {key: on_device(torch.stack([own[key] for own in state_dicts])) for key in there[0]}
        )
        samples = on_device(x)
        for networks, more in ((there, listed), (stacked, 0)):
            with pretended_device() as counts:
                found = plan.lower(networks, samples)
                assert counts.launches <= most + converted + more, counts.ops
                assert counts.syncs <= 2 and counts.copies == 0
                assert counts.ops["chain_jacobian_norms"] == 1
                assert counts.ops["chain_secants_points"] == 1
                assert counts.ops["chain_secants_quotients"] == 1
            assert all(bound.certified for bound in found)
            assert [bound.value for bound in found] == pytest.approx(expected, rel=1e-6)


def test_launches_of_lower_bounds_of_a_thousand_state_dicts() -> None:
    plan, state_dicts, x = many(1000, torch.float32)
    there, samples = on_device(state_dicts), on_device(x)
    stacked = StackedStateDicts(
        {key: on_device(torch.stack([own[key] for own in state_dicts])) for key in there[0]}
    )
    for networks in (there, stacked):
        with pretended_device() as counts:
            assert all(bound.certified for bound in plan.lower(networks, samples))
            assert counts.launches <= 25 and counts.syncs <= 2 and counts.copies == 0


def test_large_or_unlike_state_dicts_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of them all might not fit; one of another dtype does not belong to the others."""
    plan, state_dicts, x = many(30, torch.float32)
    expected = [bound.value for bound in plan.lower(state_dicts, x)]
    wide = [*state_dicts[:-1], {key: value.double() for key, value in state_dicts[-1].items()}]
    with pretended_device() as counts:
        found = plan.lower(on_device(wide), on_device(x))
        assert "stack" in counts.ops and counts.ops["_foreach_norm"] > 1
        assert [bound.value for bound in found] == pytest.approx(expected, rel=1e-6)
        monkeypatch.setattr(stacked_module, "_MOST_BYTES", 1 << 20)
        counts.clear()
        found = plan.lower(on_device(state_dicts), on_device(x))
        assert counts.ops["chain_jacobian_norms"] == counts.ops["chain_secants_points"] == 1
        assert counts.syncs <= 2
        assert [bound.value for bound in found] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_state_dicts_of_several_dtypes(norm: float) -> None:
    """Each network in its own, also where the others' numbers do not hold its."""
    for name in ("chain", "convolutional", "merged", "residual"):
        model, x = case(name)
        plan, state_dicts = lipfast.compile(model, x), similar(model, 4)
        for index, dtype in ((1, torch.float64), (2, torch.float16)):
            state_dicts[index] = {key: value.to(dtype) if value.is_floating_point() else value
                                  for key, value in state_dicts[index].items()}  # fmt: skip
        last = next(key for key, value in reversed(state_dicts[1].items()) if value.dim() > 1)
        state_dicts[1][last] *= 1e200
        expected = plan.bounds(state_dicts, x, norm=norm)
        with pretended_device():
            found = plan.bounds(on_device(state_dicts), on_device(x), norm=norm)
        for one, other in zip(found, expected, strict=True):
            assert one.upper.certified
            assert one.upper.value == pytest.approx(other.upper.value, rel=3e-3)
            assert one.lower.value == pytest.approx(other.lower.value, rel=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_modes_of_torch(norm: float) -> None:
    """Autocast refuses to put half types together that are not its own."""

    @contextlib.contextmanager
    def default_dtype() -> Iterator[None]:
        torch.set_default_dtype(torch.float16)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)

    for name in ("chain", "convolutional", "computed"):
        model, x = case(name)
        plan, state_dicts = lipfast.compile(model, x), similar(model, 3)
        state_dicts = [
            {key: value.half() if value.dim() == 1 else value for key, value in one.items()}
            for one in state_dicts
        ]
        expected = numbers(plan.bounds(state_dicts, x, norm=norm))
        for mode in (default_dtype, lambda: torch.autocast("cpu", torch.bfloat16)):
            for networks in both_forms(state_dicts):
                with pretended_device():
                    samples = on_device(x)
                    with mode():
                        found = numbers(plan.bounds(networks, samples, norm=norm))
                        found = [one.cpu() for one in found]
                for one, other in zip(found, expected, strict=True):
                    torch.testing.assert_close(one.double(), other.double(), rtol=3e-3, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_loose_secants_on_a_device_are_bounded_in_norm(norm: float) -> None:
    """Of a deep network, elementwise bounds leave little: one more wait for all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(30) for layer in (nn.Linear(8, 8), nn.ReLU())])
    for layer in model[::2]:
        nn.init.orthogonal_(layer.weight, 1.5)
        nn.init.constant_(layer.bias, 0.3)
    model, x = model.double(), torch.randn(5, 8).double()
    plan, state_dicts = lipfast.compile(model, x), similar(model, 3)
    expected = plan.lower(state_dicts, x, norm=norm)
    for count, form in ((1, 0), (3, 1)) if norm == 2 else ((2, 0),):
        networks = both_forms(state_dicts[:count])[form]
        with pretended_device() as counts:
            found = plan.lower(networks, on_device(x), norm=norm)
            assert counts.syncs == 2 and not counts.blocking, counts.waits
            assert counts.launches > 100
        for one, other in zip(found, expected, strict=False):
            assert one.certified and one.value == pytest.approx(other.value, rel=1e-6)
            assert one.points.shape == (2, 8)


def both_forms(state_dicts: list[dict[str, Tensor]]) -> list[Any]:
    """State dicts on the device: a list of them, and one tensor per name."""
    stacked = {name: torch.stack([one[name] for one in state_dicts]) for name in state_dicts[0]}
    return [on_device(state_dicts), StackedStateDicts(on_device(stacked))]


def similar(model: nn.Module, count: int) -> list[dict[str, Tensor]]:
    """State dicts with other numbers, of which masks and counters are those of the model."""
    return [
        {
            key: value * (1 + 0.1 * index) if value.is_floating_point() else value
            for key, value in model.state_dict().items()
        }
        for index in range(count)
    ]


@pytest.mark.parametrize("domain", [None, lipfast.Box(-1.0, 1.0)], ids=["everywhere", "box"])
@pytest.mark.parametrize("name", CASES)
def test_upper_bounds_wait_twice(name: str, domain: lipfast.Box | None) -> None:
    """Whatever the model, the norm, and the number of state dicts; launches are as many."""
    if domain is not None and name not in ("gated", "attention"):
        pytest.skip("asks for no magnitudes")
    model, x = case(name)
    plan = lipfast.compile(model, x)
    for norm in NORMS:
        launches: list[int] = []
        for count in (1, 2, 5):
            state_dicts = similar(model, count)
            known = [bound.value for bound in plan.upper(state_dicts, norm=norm, domain=domain)]
            for networks in both_forms(state_dicts):
                with pretended_device() as counts:
                    found = plan.upper(networks, norm=norm, domain=domain)
                    # A copy to the device waits, too, unless it is queued.
                    assert counts.syncs + counts.blocking <= 2, counts.waits
                launches.append(counts.launches)
                assert [bound.value for bound in found] == pytest.approx(known, rel=3e-3)
        assert launches[3] == launches[5]
        # Of a list, those that put its tensors together.
        assert launches[2] == launches[4] <= launches[3] + 2 * len(model.state_dict())


# Models, samples, and how many launches a norm 2 may take.
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "several": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)),
            *(nn.Flatten(), nn.Linear(4 * 2 * 2, 3)),
        ),
        (3, 6, 6),
        3700,
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, groups=8, dilation=2), nn.ReLU(), nn.Conv2d(8, 6, 1, groups=2)),
        ),
        (4, 6, 6),
        3300,
    ),
    "circular": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()),
            nn.Conv2d(3, 3, 3, stride=2, padding=1, padding_mode="circular"),
        ),
        (2, 5, 5),
        5700,
    ),
    "longer than the input": (
        lambda: nn.Conv1d(2, 3, 5, padding=2, padding_mode="circular"),
        (2, 3),
        1800,
    ),
    "transposed": (
        lambda: nn.Sequential(
            *(nn.ConvTranspose2d(3, 2, 3, stride=2, output_padding=1), nn.ReLU()),
            nn.ConvTranspose2d(2, 2, 3, padding=1),
        ),
        (3, 3, 3),
        3500,
    ),
    "three axes": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 3, 3), 1700),
    "patches": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 4, stride=4), nn.GELU(), nn.Conv2d(4, 4, 1), nn.ReLU()),
            nn.Conv2d(4, 2, 1, stride=2, padding=1),
        ),
        (3, 8, 8),
        40,
    ),
    "merged": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.Conv1d(3, 2, 2), nn.Flatten()),
        (2, 5),
        1900,
    ),
    "halves": (lambda: nn.Conv1d(2, 3, 3, padding=1).half(), (2, 5), 1800),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_wait_twice(name: str) -> None:
    torch.manual_seed(0)
    make, shape, most = CONVOLUTIONS[name]
    model = make().eval()
    plan = lipfast.compile(model.float(), torch.randn(2, *shape))
    launches = []
    for count in (2, 4):
        state_dicts = similar(model, count)
        known = plan.upper(state_dicts)
        for networks in both_forms(state_dicts):
            with pretended_device() as counts:
                found = plan.upper(networks)
                assert counts.syncs + counts.blocking <= 2, counts.waits
            launches.append(counts.launches)
            for one, other in zip(found, known, strict=True):
                assert one.certified and one.value == pytest.approx(other.value, rel=2e-3)
                for layer, same in zip(one.layers, other.layers, strict=True):
                    assert layer.lower <= same.upper and same.lower <= layer.upper
                    assert layer.lower == pytest.approx(same.lower, rel=2e-3)
    assert launches[0] == launches[2] and launches[1] == launches[3] and max(launches) <= most


def one_tap(kernel: Tensor, matrix: Tensor) -> Tensor:
    kernel = torch.zeros_like(kernel)
    kernel[:, :, 1, 2] = matrix
    return kernel


# Kernels whose symbols are equally large at all frequencies, and nearly so; waits for them.
FLAT: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "dirac": (lambda kernel: nn.init.dirac_(torch.empty_like(kernel)), 1),
    "orthogonal": (lambda kernel: one_tap(kernel, torch.linalg.qr(kernel[:, :, 0, 0])[0]), 1),
    "one tap": (lambda kernel: one_tap(kernel, kernel[:, :, 0, 0]), 1),
    "nearly": (lambda kernel: nn.init.dirac_(torch.empty_like(kernel)) + 0.05 * kernel, 2),
}


@pytest.mark.parametrize("name", FLAT)
def test_kernels_with_flat_symbols_wait_twice(name: str) -> None:
    """However many of them there are, and beside others."""
    torch.manual_seed(0)
    make, waits = FLAT[name]
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 3)).eval()
    plan, launches = lipfast.compile(model, torch.randn(2, 8, 5, 5)), []
    for count, form in ((1, 1), (3, 0)):
        states = similar(model, count)
        states = [{**one, "0.weight": make(one["0.weight"])} for one in states]
        known = plan.upper(states)
        networks = both_forms(states)[form]
        with pretended_device() as counts:
            found = plan.upper(networks)
            assert counts.syncs == waits and not counts.blocking, counts.waits
        launches.append(counts.launches)
        for one, other in zip(found, known, strict=True):
            assert one.certified and one.value == pytest.approx(other.value, rel=2e-3)
    assert max(launches) <= min(launches) + 20


def test_kernels_that_are_flat_zero_or_not_finite() -> None:
    """A symbol that is equally large everywhere, a kernel of zeros, and one with NaN."""
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 3))
    plan = lipfast.compile(model.eval(), torch.randn(2, 2, 5, 5))
    state = dict(model.state_dict())
    states = [{**state, "0.weight": nn.init.dirac_(torch.empty(2, 2, 3, 3))}, state]
    states.append({**state, "0.weight": torch.zeros(2, 2, 3, 3)})
    known = [bound.value for bound in plan.upper(states)]
    bad = {**state, "0.weight": torch.full((2, 2, 3, 3), math.nan)}
    with pretended_device() as counts:
        found = plan.upper(on_device(states))
        assert counts.syncs == 1 and not counts.blocking
        assert [bound.value for bound in found] == pytest.approx(known, rel=2e-3)
        assert plan.upper(on_device(states[2])).value == 0.0
        with pytest.raises(NonFiniteError, match=r"state dict 1: .*'0.weight'"):
            plan.upper(on_device([state, bad]))


def test_a_tracker_of_convolutions() -> None:
    model, x = case("convolutional")
    plan = lipfast.compile(model, x)
    with pretended_device() as counts:
        tracker = plan.tracker()
        bounds = []
        for state_dict in similar(model, 3):
            counts.clear()
            bounds.append(tracker.upper(on_device(state_dict)))
            assert counts.syncs + counts.blocking <= 3, counts.waits
        start = tracker.vectors["0.weight"]
    assert start.right.shape == (1, 4) and start.left.shape == (2, 3)
    assert float(start.right.inner.norm()) == pytest.approx(1.0)
    known = plan.upper(similar(model, 3))
    for one, other in zip(bounds, known, strict=True):
        assert one.value == pytest.approx(other.value, rel=2e-3)


BOXED = [(name, domain) for name in ("chain", "gated") for domain in ("box", "ball")]


@pytest.mark.parametrize(("name", "where"), [*((name, None) for name in CASES), *BOXED])
def test_lower_bounds_wait_twice(name: str, where: str | None) -> None:
    """Whatever the model, the norm, the domain, and the number of state dicts."""
    domains = {None: None, "box": lipfast.Box(-1.0, 1.0), "ball": lipfast.Ball(2.0)}
    domain = domains[where]
    model, x = case(name)
    plan, samples = lipfast.compile(model, x), on_device(x)
    for norm in NORMS:
        launches: list[int] = []
        for count in (1, 2, 5) if domain is None else (2,):
            state_dicts = similar(model, count)
            expected = plan.lower(state_dicts, x, norm=norm, domain=domain)
            for networks in both_forms(state_dicts):
                with pretended_device() as counts:
                    found = plan.lower(networks, samples, norm=norm, domain=domain)
                    # A copy to the device waits, too, unless it is queued.
                    assert counts.syncs <= 2 and not counts.blocking, counts.waits
                launches.append(counts.launches)
                for one, other in zip(found, expected, strict=True):
                    assert one.certified and one.value == pytest.approx(other.value, rel=3e-3)
                    values = (one.jacobian.value, one.mean, one.rms)
                    known = (other.jacobian.value, other.mean, other.rms)
                    assert values == pytest.approx(known, rel=1e-4)
        # torch convolves network by network
        if domain is None and name not in ("convolutional", "upsampled"):
            assert launches[3] == launches[5]
            assert launches[2] == launches[4] <= launches[3] + 2 * len(model.state_dict())


def test_wrong_second_derivatives_are_noticed_with_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products of columns are checked on the device; where they are wrong, rows are taken."""
    model, x = case("gated")
    plan, state_dicts = lipfast.compile(model, x), similar(model, 2)
    expected = [bound.jacobian.value for bound in plan.lower(state_dicts, x)]
    columns, jvp = Linearization.columns, Linearization.jvp
    monkeypatch.setattr(Linearization, "columns", lambda self, *ends: 2 * columns(self, *ends))
    monkeypatch.setattr(Linearization, "jvp", lambda self, v: 2 * jvp(self, v))
    with pretended_device():
        found = plan.lower(on_device(state_dicts), on_device(x))
    assert [bound.jacobian.value for bound in found] == pytest.approx(expected, rel=1e-6)


def test_several_inputs_wait_twice() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.one(x) + self.other(y))

    torch.manual_seed(0)
    model, x = Sum(), (torch.randn(5, 4), torch.randn(5, 5))
    plan, state_dicts = lipfast.compile(model, x), similar(model, 3)
    expected = [bound.value for bound in plan.lower(state_dicts, x)]
    broken = (x[0], x[1].index_fill(0, torch.tensor([2]), math.nan))
    with pretended_device() as counts:
        found = plan.lower(on_device(state_dicts), on_device(x))
        assert counts.syncs <= 2 and not counts.blocking
        assert [bound.value for bound in found] == pytest.approx(expected, rel=1e-5)
        with pytest.raises(NonFiniteError, match=r"input 1: 1 of 5 samples.*sample 2"):
            plan.lower(on_device(state_dicts), on_device(broken))


@pytest.mark.parametrize("norm", NORMS)
def test_launches_for_stacked_networks(norm: float) -> None:
    """40-256-256-10, as 1000 checkpoints of it take."""
    torch.manual_seed(0)
    model = mlp(40, 256, 256, 10).eval()
    plan = lipfast.compile(model, torch.randn(2, 40))
    seen = []
    for count in (23, 46):
        stacked = {
            key: on_device(value.expand(count, *value.shape).clone())
            for key, value in model.state_dict().items()
        }
        for checked in (False, True):
            with pretended_device() as counts:
                networks = StackedStateDicts(stacked)
                networks = plan.checked(networks) if checked else networks
                counts.clear()
                bounds = plan.upper(networks, norm=norm)
            assert all(bound.certified for bound in bounds)
            seen.append((counts.launches, counts.syncs))
    assert seen[0] == seen[2] and seen[1] == seen[3]
    assert max(seen) <= ((30, 2) if norm == 2 else (51, 2))


def test_what_is_wrong_with_one_of_many_is_said_as_for_one() -> None:
    """Checks that come with the results; and a merged map that only one network cannot have."""
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))).eval()
    for model, x, key, value, says in (
        (*case("folded"), "1.running_var", -1.0, "state dict 1: BatchNorm"),
        (*case("gated"), "mask", -math.inf, "state dict 1: aten.softmax"),
        (normed, torch.randn(2, 6), "0.parametrizations.weight.original1", 0.0, "state dict 1: "),
    ):
        plan = lipfast.compile(model, x)
        state_dicts = [
            {own: tensor.double() for own, tensor in one.items()} for one in similar(model, 3)
        ]
        state_dicts[1][key] = torch.full_like(state_dicts[1][key], value)
        for networks in both_forms(state_dicts):
            for norm in NORMS:
                with pretended_device(), pytest.raises(NonFiniteError, match=says):
                    plan.upper(networks, norm=norm)
                if key == "1.running_var" and norm != 2:  # as a rule, not folded: inf or NaN
                    continue
                with pytest.raises(NonFiniteError, match=says):
                    plan.lower(state_dicts, x, norm=norm)
                with pretended_device(), pytest.raises(NonFiniteError, match=says):
                    plan.lower(networks, on_device(x), norm=norm)
                with pretended_device(), pytest.raises(NonFiniteError, match=says):
                    plan.bounds(networks, on_device(x), norm=norm)
    # What is made of many networks at once is no bracket for one that cannot be folded.
    model, x = case("convolutional")
    plan = lipfast.compile(model, x)
    state_dicts = similar(model, FEWEST)
    state_dicts[2]["1.running_var"] = torch.tensor([1.0, -1.0])
    for networks in both_forms(state_dicts):
        for norm in NORMS:
            with pretended_device(), pytest.raises(NonFiniteError, match="state dict 2: BatchNorm"):
                plan.upper(networks, norm=norm)
    model, x = case("merged")
    plan = lipfast.compile(model, x)
    state_dicts = [{key: value.double() for key, value in one.items()} for one in similar(model, 4)]
    state_dicts[2]["0.weight"] *= 2.0**600
    state_dicts[2]["1.weight"] *= 2.0**600
    known = plan.upper(state_dicts)
    for networks in both_forms(state_dicts):
        with pretended_device() as counts:
            found = plan.upper(networks)
            assert counts.syncs <= 4
        assert [len(bound.layers) for bound in found] == [1, 1, 2, 1]
        for one, other in zip(found, known, strict=True):
            assert one.log_value == pytest.approx(other.log_value, rel=1e-5)


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley", "householder"])
def test_orthogonal_maps_wait_twice(kind: str) -> None:
    torch.manual_seed(0)
    made = (nn.Linear(4, 4), nn.Linear(4, 3))
    layers = [nn.utils.parametrizations.orthogonal(one, orthogonal_map=kind) for one in made]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).eval()
    plan = lipfast.compile(model, torch.randn(2, 4))
    launches = []
    for count in (2, 4):
        state_dicts = [
            {key: value + 0.01 * index * ("original" in key) for key, value in state.items()}
            for index, state in enumerate([dict(model.state_dict())] * count)
        ]
        known = plan.upper(state_dicts)
        for networks in both_forms(state_dicts):
            with pretended_device() as counts:
                found = plan.upper(networks)
                assert counts.syncs + counts.blocking <= 2, counts.waits
            launches.append(counts.launches)
            for one, other in zip(found, known, strict=True):
                assert one.certified and one.value == pytest.approx(other.value, rel=1e-6)
    assert launches[0] == launches[2] and launches[1] == launches[3] and max(launches) <= 1700


class Tables(nn.Module):
    """Makes numbers itself: so many that a plan holds how they are made, not what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, MAX_FOLDED_ENTRIES))

    def forward(self, x: Tensor) -> Tensor:
        count, device = MAX_FOLDED_ENTRIES + 1, x.device
        slopes = torch.linspace(0.5, 1, count, device=device)
        even = torch.arange(count, device=device) % 2 == 0
        weight = torch.cat([self.weight, self.weight.new_zeros(2, 1)], 1)
        return x @ (torch.where(even, weight * slopes, 0.0)[:, 1:]).mT + torch.ones(2).to(device)


def test_tables_too_large_for_a_plan_are_made_on_the_device() -> None:
    torch.manual_seed(0)
    model, x = Tables().eval(), torch.randn(2, MAX_FOLDED_ENTRIES)
    plan, state_dicts = lipfast.compile(model, x), similar(model, 3)
    known = [(bound.lower.value, bound.upper.value) for bound in plan.bounds(state_dicts, x)]
    for networks in both_forms(state_dicts):
        with pretended_device():
            found = plan.bounds(networks, on_device(x))
        for one, (lower, upper) in zip(found, known, strict=True):
            assert one.lower.value == pytest.approx(lower, rel=1e-6)
            assert one.upper.value == pytest.approx(upper, rel=1e-6)


@pytest.mark.parametrize("kind", ["matrix_exp", "cayley"])
def test_orthogonal_maps_of_wide_layers(kind: str) -> None:
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(80, 3), orthogonal_map=kind)
    plan = lipfast.compile(nn.Sequential(layer).eval(), torch.randn(2, 80))
    state = {f"0.{key}": value for key, value in layer.state_dict().items()}
    known = plan.upper(state)
    with pretended_device():
        found = plan.upper(on_device(state))
    assert found.certified and found.value == pytest.approx(known.value, rel=1e-6)


def test_orthogonal_maps_that_need_another_look() -> None:
    """A parameter too large for the schedule of exponentials."""
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp")
    plan = lipfast.compile(nn.Sequential(layer).eval(), torch.randn(2, 3))
    state = {key: value.clone() for key, value in layer.state_dict(prefix="0.").items()}
    state["0.parametrizations.weight.original"][2, 0] = 3e4
    known = plan.upper(state)
    with pretended_device() as counts:
        found = plan.upper(on_device(state))
        assert counts.syncs > 2
    assert found.certified and found.value == pytest.approx(known.value, rel=1e-6)


def test_matrices_and_kernels() -> None:
    matrices = [torch.randn(5, 7), torch.randn(7, 5), torch.randn(4, 4).double()]
    kernel = torch.randn(2, 2, 3)
    for norm in NORMS:
        here = lipfast.spectral_norms(matrices, norm=norm)
        with pretended_device() as counts:
            there = lipfast.spectral_norms(on_device(matrices), norm=norm)
            assert counts.syncs == 1
            assert there.lower.device == there.right[0].device == CUDA
            torch.testing.assert_close(there.upper.cpu(), here.upper, rtol=3e-6, atol=0)
            assert bool((there.lower.cpu() <= here.upper).all())
            bad = on_device([torch.ones(2, 2), torch.full((2, 2), math.nan)])
            with pytest.raises(NonFiniteError, match="matrix 1: holds NaN"):
                lipfast.spectral_norms(bad, norm=norm)
    conv = lipfast.conv_norms(kernel, input_sizes=6, padding=1)
    with pretended_device():
        found = lipfast.conv_norms(on_device(kernel), input_sizes=6, padding=1)
        assert bool(found.certified[0])
        assert found.lower.cpu()[0] <= conv.upper[0]
        assert conv.lower[0] <= found.upper.cpu()[0] <= conv.upper[0] * (1 + 2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Stored in 16 bits, computed in 32: what the same numbers in float32 give."""
    model, x = case("chain")
    plan = lipfast.compile(model, x)
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    wide = {key: value.float() for key, value in state.items()}
    expected = plan.bounds(wide, x)
    with pretended_device():
        for networks in (
            on_device(state),
            StackedStateDicts(on_device({k: v[None] for k, v in state.items()})),
        ):
            found = plan.bounds(networks, on_device(x))
            found = found if isinstance(found, lipfast.Bounds) else found[0]
            assert found.upper.certified and found.lower.certified
            assert found.upper.value == pytest.approx(expected.upper.value, rel=1e-5)
            assert found.lower.jacobian.value == pytest.approx(
                expected.lower.jacobian.value, rel=1e-5
            )
        halved = module_on_device(model.to(dtype))
        norms = lipfast.jacobian_norms(halved, on_device(x))
        assert norms.dtype == torch.float32
        assert float(norms.max()) <= expected.upper.value
        assert lipfast.upper_bound(halved, on_device(x.to(dtype))).value == found.upper.value


def mixed() -> dict[str, tuple[str, Callable[[Any, Any, Any], Any]]]:
    """What is asked of a model on the device, its plan, and samples on the CPU."""
    return {
        "jacobian_norms": ("samples are on cpu", lambda m, p, x: lipfast.jacobian_norms(m, x)),
        "lower_bound": ("samples are on cpu", lambda m, p, x: lipfast.lower_bound(m, x)),
        "bounds": ("on cpu", lambda m, p, x: lipfast.bounds(m, x)),
        "plan.lower": ("samples are on cpu", lambda m, p, x: p.lower(m.state_dict(), x)),
        "plan.bounds": ("samples are on cpu", lambda m, p, x: p.bounds(m.state_dict(), x)),
        "other samples": (
            "samples are on cuda:1",
            lambda m, p, x: p.lower(m.state_dict(), on_device(x, "cuda:1")),
        ),
        "one state dict": (
            "parameter '2.bias' is on cpu and parameter '0.weight' on cuda:0",
            lambda m, p, x: p.upper({**m.state_dict(), "2.bias": torch.zeros(5)}),
        ),
        "two state dicts": (
            "state dict 1: parameter '0.weight' is on cpu",
            lambda m, p, x: p.upper([m.state_dict(), mlp(6, 8, 5).state_dict()]),
        ),
        "matrices": (
            "matrix 1: is on cpu",
            lambda m, p, x: lipfast.spectral_norms([m[0].weight, torch.ones(2, 2)]),
        ),
        "inputs": (
            "on cpu and cuda:0",
            lambda m, p, x: lipfast.jacobian_norms(nn.Bilinear(6, 6, 2), (x, on_device(x))),
        ),
    }


@pytest.mark.parametrize("name", mixed())
def test_mixed_placements_are_refused(name: str) -> None:
    model, x = case("chain")
    plan = lipfast.compile(model, x)
    says, call = mixed()[name]
    with pretended_device(), pytest.raises(ArgumentError, match=says):
        call(module_on_device(model), plan, x)


@pytest.mark.parametrize("name", ["chain", "folded", "convolutional"])
def test_checked_state_dicts_on_several_devices_are_refused(name: str) -> None:
    model, x = case(name)
    plan, state = lipfast.compile(model, x), dict(model.state_dict())
    with pretended_device():
        here, there = plan.checked([state])[0], plan.checked([on_device(state)])[0]
        samples = on_device(x)
        for pair in ((there, here), (there, state), (here, there), (on_device(state), here)):
            for call in (plan.upper, lambda both: plan.lower(both, samples)):
                with pytest.raises(
                    ArgumentError, match=r"state dict 1: parameter '0\.weight' is on"
                ):
                    call(pair)


@pytest.mark.parametrize("device", ["mps:0", "xpu:0", "cuda:0"])
def test_devices_without_kernels_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is CUDA where lipfast was built without it."""
    model, x = case("chain")
    plan = lipfast.compile(model, x)
    there, samples = module_on_device(model, device), on_device(x, device)
    says = f"on {device}; this build has kernels for cpu"
    with pretended_device():
        if device == "cuda:0":
            monkeypatch.setattr(_native, "_cuda_info", None)
            monkeypatch.setattr(_native, "_cuda_reason", "built without CUDA")
            says += ".*built without CUDA"
        for call in (
            lambda: plan.upper(dict(there.state_dict())),
            lambda: plan.lower(dict(there.state_dict()), samples),
            lambda: lipfast.jacobian_norms(there, samples),
            lambda: lipfast.lower_bound(there, samples),
            lambda: lipfast.input_gradient_norms(lambda z: there(z).sum(1), samples),
            lambda: lipfast.spectral_norms([there[0].weight]),
            lambda: lipfast.conv_norms([samples[None]], input_sizes=9),
        ):
            with pytest.raises(ArgumentError, match=says):
                call()


def test_numbers_on_a_device_that_are_not_finite() -> None:
    model, x = case("chain")
    plan = lipfast.compile(model, x)
    state = dict(model.state_dict())
    broken = {**state, "2.bias": torch.full((5,), math.inf)}
    x[3, 1] = math.nan
    stacked = {key: torch.stack([value, value]) for key, value in state.items()}
    stacked["0.bias"][1, 2] = math.nan
    with pretended_device():
        with pytest.raises(NonFiniteError, match=r"state dict 1: parameter '2.bias'.*5 non-finite"):
            plan.upper(on_device([state, broken]))
        with pytest.raises(NonFiniteError, match=r"state dict 1: parameter '0.bias'.*1 non-finite"):
            plan.upper(StackedStateDicts(on_device(stacked)))
        with pytest.raises(NonFiniteError, match=r"1 of 5 samples.*sample 3"):
            plan.lower(on_device(state), on_device(x))
        huge = {key: value * 1e30 for key, value in state.items()}
        lower = plan.lower(on_device(huge), on_device(x[:3]))
        assert 1e50 < lower.jacobian.value < math.inf


def test_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "built without CUDA" in str(_native.no_cuda_device()) or torch.version.cuda
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pretended_device(), mock.patch.object(torch.cuda, "is_available", lambda: False):
        assert _native.no_cuda_device() == "no CUDA device: CUDA_VISIBLE_DEVICES is ''"
        assert lipfast.info()["devices"] == ("cpu",)


class Scaled(nn.Module):
    """Slopes that parameters say: of a composition, and of a rule that a user wrote."""

    def __init__(self, *, composed: bool) -> None:
        super().__init__()
        self.composed = composed
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.slope = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        gate = torch.sigmoid(self.slope * hidden) if self.composed else 1.0
        return self.last(
            hidden * gate if self.composed else nn.functional.prelu(hidden, self.slope)
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("composed", [True, False])
def test_slopes_that_the_host_has_to_look_at(
    composed: bool, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from the device with one more wait, of all networks together."""
    if not composed:
        monkeypatch.setitem(RULES, "aten.prelu", replace(RULES["aten.prelu"]))
    torch.manual_seed(0)
    model, x = Scaled(composed=composed), torch.randn(2, 6)
    plan, state_dicts = lipfast.compile(model, x), similar(model, 3)
    method = {"method": "quadratic"} if norm == 2 else {}
    known = plan.upper(state_dicts, norm=norm, **method)
    for networks in both_forms(state_dicts):
        with pretended_device() as counts:
            found = plan.upper(networks, norm=norm, **method)
            assert counts.syncs + counts.blocking <= 3, counts.waits
        for one, other in zip(found, known, strict=True):
            assert one.method == other.method and one.method.startswith(("interval", "quadratic"))
            assert one.value == pytest.approx(other.value, rel=1e-2)
