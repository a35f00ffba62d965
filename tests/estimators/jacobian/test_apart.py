"""Models that mix samples, or are random, are told from the rounding of batched products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.apart import require_apart
from lipfast.estimators.jacobian.function import differentiating, model_function
from lipfast.estimators.jacobian.precision import other_precision
from tests.support.jacobian_cases import samples


class Written(nn.Module):
    def __init__(self, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(3, 3), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, x)


class Attention(nn.Module):
    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


class Positions(nn.Module):
    """Of the samples, where those of the tokens were meant."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(len(x), dtype=x.dtype)[:, None, None]


def halved(_: nn.Linear, x: Tensor) -> Tensor:
    while x.norm() > 1:
        x = x / 2
    return x


MIXES: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "centred": lambda f, x: f(x - x.mean(0)),
    "softmax": lambda f, x: f(x).softmax(0),
    "normalized": lambda f, x: functional.normalize(f(x), dim=0),
    "quantile": lambda f, x: x - x.quantile(0.5, dim=0),
    "sorted": lambda f, x: x.sort(0).values,
    "cumulative": lambda f, x: x.cumsum(0),
    "reversed": lambda f, x: f(x).flip(0),
    "condition": lambda f, x: f(x) if x.sum() > 0 else x,
    "loop": halved,
    "number": lambda f, x: f(x) * x.abs().max().item(),
    "first of the batch": lambda f, x: f(x) * x[0, :1].sigmoid(),
    "size of the batch": lambda f, x: f(x) / len(x),
    "a little": lambda f, x: f(x) + 1e-5 * x.mean(0),
}


def check(model: nn.Module, x: Tensor) -> None:
    with (
        model_function(model, (x,)) as problem,
        differentiating(),
        other_precision(model, (x,), problem) as other,
    ):
        require_apart(problem, "Model", other)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", MIXES)
def test_what_mixes_is_refused(name: str, count: int) -> None:
    for dtype in (torch.float32, torch.float64):
        model = Written(MIXES[name]).to(dtype)
        x = samples(count, 3)
        if count > 1:
            x[-1] = -2 * x[0]
        with pytest.raises(ArgumentError, match="Model mixes the samples of a batch"):
            check(model, x.to(dtype))


@pytest.mark.parametrize("count", [1, 4])
def test_layers_that_mix_are_refused(count: int) -> None:
    statistics = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))
    for model, x in (
        (statistics, samples(count, 2, 6, 6)),
        (Attention(batch_first=False), samples(count, 5, 4)),
        (Positions(), samples(count, 5, 4)),
    ):
        with pytest.raises(ArgumentError, match="mixes the samples"):
            check(model, x)
    check(Attention(batch_first=True), samples(count, 5, 4))


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_one_sample_that_a_condition_treats_otherwise(position: int) -> None:
    x = torch.ones(4, 3)
    x[position] = -0.5  # alone its sum is negative, that of the batch is not
    with pytest.raises(ArgumentError, match="mixes"):
        check(Written(MIXES["condition"]), x)


def test_what_fails_on_one_sample_alone_mixes() -> None:
    statistics = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False))
    pairs = Written(lambda f, x: f(x).reshape(-1, 2, 3).flip(1).reshape(-1, 3))
    squeezed = Written(lambda f, x: f(x).unsqueeze(2).squeeze())
    for model in (statistics, pairs, squeezed):
        with pytest.raises(ArgumentError, match=r"not on (one alone|3) .*depend on the batch"):
            check(model, samples(4, 3))


GENERATOR = torch.Generator()
RANDOM: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "dropout": lambda f, x: functional.dropout(f(x)),
    "rare dropout": lambda f, x: functional.dropout(f(x), 0.02),
    "noise": lambda f, x: f(x) + 0.01 * torch.randn_like(x),
    "own generator": lambda f, x: f(x) + torch.rand(3, generator=GENERATOR),
}


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_random_is_refused(name: str, count: int) -> None:
    model = Written(RANDOM[name])
    state = torch.get_rng_state()
    with pytest.raises(ArgumentError, match=r"other outputs.*training=self\.training"):
        check(model, samples(count, 3))
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_that_are_drawn_and_not_used_are_no_harm() -> None:
    check(Written(lambda f, x: f(x) + 0 * torch.rand(3)), samples(4, 3))


def bfloat16(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return linear(x).float()


def routed(linear: nn.Linear, x: Tensor) -> Tensor:
    """A mixture of experts: how many samples meet in a product depends on all of them."""
    y = x.clone()
    chosen = x[:, 0] > 0
    y[chosen] = linear(x[chosen])
    return y


APART: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "bfloat16 inside": bfloat16,
    "float32 inside": lambda f, x: functional.linear(x.float(), f.weight.float()),
    "experts": routed,
    "zero but for rounding": lambda f, x: f(x).softmax(1).sum(1, keepdim=True) - 1,
    "cancellation": lambda f, x: (f(x) + 1e6) - 1e6,
    "rounded": lambda f, x: (100 * f(x)).round() / 100,
    "overflow": lambda f, x: (1e3 * f(x)).exp(),
    "no domain": lambda f, x: x.sqrt(),
    "condition per sample": lambda f, x: torch.where(x[:, :1] > 0, f(x), x),
}


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", APART)
def test_rounding_is_no_mixture(name: str, count: int) -> None:
    for dtype in (torch.float32, torch.float64):
        check(Written(APART[name]).to(dtype), samples(count, 3).to(dtype))


@pytest.mark.parametrize("width", [64, 400])
def test_deep_products_differ_by_rounding_only(width: int) -> None:
    torch.manual_seed(0)
    layers = [
        m for _ in range(12) for m in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())
    ]
    check(nn.Sequential(*layers), samples(5, width))


def test_public_calls_refuse_and_leave_all_as_it_was() -> None:
    model, x = Written(MIXES["centred"]), samples(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    calls: list[Callable[[], object]] = [
        lambda: lipfast.jacobian_norms(model, x),
        lambda: lipfast.jacobian_norms(model, x, method="rows", norm=1),
        lambda: lipfast.jacobian_norms(model, x, create_graph=True),
        lambda: lipfast.jacobian_norms(model, torch.utils.data.DataLoader(x, batch_size=2)),  # type: ignore[arg-type]
        lambda: lipfast.lower_bound(model, x),
        lambda: lipfast.lower_bound(model, x, search="ascent"),
        lambda: lipfast.input_gradient_norms(Written(lambda f, x: (x - x.mean(0)).sum(1)), x),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="Written mixes"):
            call()
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
