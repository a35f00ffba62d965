"""Ops that move, join, add up or compare entries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipfast.errors import LipfastError
from lipfast.estimators.plan import Plan
from tests.support.explicit import (
    NORMS,
    Function,
    check_enclosure,
    check_linear,
    check_quotients,
    traced,
)

SHAPE = (4, 3, 2)
# Bounds are exact for these; so is the norm of the explicit matrix.
EXACT = {
    "permute": lambda x: x.permute(0, 3, 1, 2),
    "transpose": lambda x: x.transpose(-1, 1),
    "flip": lambda x: x.flip(-1, 1),
    "roll": lambda x: x.roll((1, 2), (1, -1)),
    "slice": lambda x: x[:, 1:3, ::2],
    "select": lambda x: x[:, -1],
    "pixel shuffle": lambda x: functional.pixel_shuffle(x, 2),
    "channel shuffle": lambda x: functional.channel_shuffle(x, 2),
    "index": lambda x: x[:, [0, 0, 3, 0]],
    "two indices": lambda x: x[:, [0, 1, 1], [2, 2, 2]],
    "index select": lambda x: x.index_select(2, torch.tensor([1, 1])),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat interleave": lambda x: x.repeat_interleave(3, 2),
    "unfold": lambda x: x.unfold(1, 3, 1),
    "patches": lambda x: functional.unfold(x, (2, 2), padding=1),
    "zeros around": lambda x: functional.pad(x, (1, 2, 0, 1)),
    "a constant around": lambda x: functional.pad(x, (1, 1), value=-7.5),
    "crop": lambda x: functional.pad(x, (0, 0, -1, 1)),
    "reflect": lambda x: functional.pad(x, (1, 1, 2, 1), mode="reflect"),
    "replicate": lambda x: functional.pad(x, (2, 1, 0, 1), mode="replicate"),
    "circular": lambda x: functional.pad(x, (1, 0, 2, 2), mode="circular"),
    "first chunk": lambda x: x.chunk(2, 1)[0],
    "uneven split": lambda x: x.split([1, 3], 1)[1],
    "last of a split": lambda x: x.split(3, 1)[-1],
    "unbind": lambda x: x.unbind(2)[1],
    "mean": lambda x: x.mean((2, 3)),
    "mean, kept": lambda x: x.mean(-1, keepdim=True),
    "sum": lambda x: x.sum(1),
    "squeeze": lambda x: x[:, :, :1].squeeze(2).unsqueeze(-1),
    "cat with itself": lambda x: torch.cat([x, x], 2),
    "stack with itself": lambda x: torch.stack([x, x, x], -1),
    "constants of the code": lambda x: x * torch.arange(2) + torch.ones(3, 1),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_constants(name: str) -> None:
    check_linear(Function(EXACT[name]), SHAPE, digits=1e-14)


# Never below, but branches that go together are bounded one by one.
LOOSE = {
    "cat of branches": lambda x: torch.cat([2 * x, -x.sum(1, keepdim=True)], 1),
    "pieces put together": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "residual": lambda x: x - 0.5 * x.flip(1),
    "stack": lambda x: torch.stack([x, 3 * x], 1),
}


@pytest.mark.parametrize("name", LOOSE)
def test_branches(name: str) -> None:
    check_linear(Function(LOOSE[name]), SHAPE, slack=(3.0, 3.0, 3.0), digits=1e-14)


NONLINEAR = {
    "maximum": (lambda x: torch.maximum(x, 2 * x.flip(1)), math.sqrt(5)),
    "minimum": (lambda x: torch.minimum(x, -x.flip(1)), math.sqrt(2)),
    "maximum, broadcast": (lambda x: torch.maximum(x, x[:, :1]), math.sqrt(5)),
    "amax": (lambda x: x.amax((2, 3)), 1.0),
    "amin": (lambda x: x.amin(1), 1.0),
    "max values": (lambda x: x.max(1).values, 1.0),
    "softmax": (lambda x: x.softmax(1), 0.5),
    "softmax in single precision": (lambda x: x.softmax(1, dtype=torch.float32), 0.5),
    "log softmax": (lambda x: x.log_softmax(-3), 2.0),
    "logsumexp": (lambda x: x.logsumexp((1, 2)), 1.0),
    "norm": (lambda x: x.norm(dim=1), 1.0),
    "1-norm": (lambda x: x.norm(1, dim=1), 2.0),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_quotients_stay_below(name: str) -> None:
    function, constant = NONLINEAR[name]
    model = Function(function)
    plan = traced(model, SHAPE)
    assert plan.upper({}).value == pytest.approx(constant)
    if "single" in name:
        model = Function(lambda x: x.softmax(1))  # a cast is an identity to the bound
    check_quotients(plan, model, SHAPE)
    if "norm" not in name:
        check_enclosure(plan, model, SHAPE, 1e-13)


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_constants_of_softmax_are_attained(count: int) -> None:
    for function in (torch.softmax, torch.log_softmax):
        model = Function(lambda y, f=function: f(y, 1))
        plan = Plan.trace(model, torch.zeros(2, count).double())
        x = torch.tensor([[40.0] + [0.0] * (count - 1)]).double()
        if function is torch.softmax:
            x[0, 1:2] = 40.0
        jacobian = torch.func.jacrev(lambda y, f=function: f(y, 0))(x[0])
        for norm in NORMS:
            truth = float(torch.linalg.matrix_norm(jacobian, norm))
            assert plan.upper({}, norm=norm).value == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.permute(1, 0, 2, 3).permute(1, 0, 2, 3), "samples"),
        (lambda x: x.flip(0), "mixes the samples"),
        (lambda x: x.roll(1, 0), "mixes the samples"),
        (lambda x: x.softmax(0), "over the samples"),
        (lambda x: torch.cat([x, x], 0)[::2], "joins the samples"),
        (lambda x: x + x.mean(0, keepdim=True), "over the samples"),
        (lambda x: x.sum() + x, "samples"),
        (lambda x: x.repeat(2, 1, 1, 1)[: x.shape[0]], "samples"),
        (lambda x: x.cumsum(1), r"@lipfast\.rule\('aten\.cumsum'\)"),
        (lambda x: x.gather(1, x.argsort(1)), "no rule"),
    ],
)
def test_samples_that_mix_and_unknown_ops_are_refused(function: object, message: str) -> None:
    with pytest.raises(LipfastError, match=message):
        Plan.trace(Function(function), torch.zeros(2, *SHAPE))  # type: ignore[arg-type]


def test_all_unknown_ops_are_listed_at_once() -> None:
    model = nn.Sequential(Function(lambda x: x.cumsum(1)), Function(lambda x: x.cumprod(1)))
    with pytest.raises(LipfastError, match=r"aten\.cumsum in module '0'.*aten\.cumprod"):
        Plan.trace(model, torch.zeros(2, 3))


def test_plans_of_many_ops_are_saved_and_loaded(tmp_path: object) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding="same"), nn.BatchNorm2d(4))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = functional.pad(self.stem(x), (1, 1, 1, 1), mode="reflect")
            first, second = functional.avg_pool2d(y, 3, 2).chunk(2, 1)
            z = torch.cat([first, torch.maximum(first, second)[:, [1, 0]]], 1)
            return self.head(z.mean(-1).flatten(1)[:, :8]).log_softmax(-1)

    model = Net().eval()
    plan = Plan.trace(model, torch.zeros(2, 2, 5, 5))
    path = tmp_path / "plan.json"  # type: ignore[operator]
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan
    state = model.state_dict()
    assert loaded.upper(state) == plan.upper(state)
    lower = loaded.lower(state, torch.randn(4, 2, 5, 5))
    assert lower.certified
    assert 0 < lower.value <= plan.upper(state).value
