"""A graph is what its module computes, or the module is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import TraceError

Function = Callable[[Any, Tensor], Tensor]
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """The identity, and what a function makes of it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        nn.init.eye_(self.layer.weight)
        self.source, self.generator = random.Random(0), np.random.default_rng(0)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def data_is_set(model: Any, x: Tensor) -> Tensor:
    y = model.layer(x)
    y.data = 3 * y.detach()
    return y


def data_of_a_weight_is_set(model: Any, x: Tensor) -> Tensor:
    weight = model.layer.weight * 1
    weight.data = 3 * weight.detach()
    return functional.linear(x, weight)


def a_failure_decides(model: Any, x: Tensor) -> Tensor:
    try:
        factor = 3.0 if float(x.abs().sum()) >= 0 else 1.0
    except Exception:  # of the trace
        factor = 1.0
    return factor * model.layer(x)


def memory_decides(model: Any, x: Tensor) -> Tensor:
    try:
        x.data_ptr()
    except Exception:  # of the trace
        return model.layer(x)
    return 3 * model.layer(x)


UNSEEN: dict[Function, str] = {
    data_is_set: "differs",
    data_of_a_weight_is_set: "differs",
    a_failure_decides: "reads values",
    memory_decides: "reads values",
    lambda m, x: m.layer(x) if torch.compiler.is_exporting() else 3 * m.layer(x): "differs",
    lambda m, x: 3 * m.layer(x) if type(x) is Tensor else m.layer(x): "differs",
    lambda m, x: 3 * m.layer(x) if isinstance(x.shape[0], int) else m.layer(x): "differs",
    lambda m, x: m.layer(x) * (3 if str(x.shape[0]) == "8" else 1): "for 8 samples",
    lambda m, x: 3 * m.layer(x) if x.shape[0] == 1 else m.layer(x): "for 1 sample,",
    lambda m, x: 3 * m.layer(x) if torch.is_grad_enabled() else m.layer(x): "gradients on",
    lambda m, x: 3 * m.layer(x) if x.requires_grad else m.layer(x): "gradients on",
    lambda m, x: m.layer(x) * (1 + 2 * (random.random() < 0.5)): "is random",
    lambda m, x: m.layer(x) * (1 + 2 * (np.random.rand() < 0.5)): "is random",
    lambda m, x: m.layer(x) * (1 + 2 * (m.source.random() < 0.1)): "is random",
    lambda m, x: m.layer(x) * (1 + 2 * (m.generator.random() < 0.1)): "is random",
}


@pytest.mark.parametrize(("function", "message"), UNSEEN.items())
def test_what_a_trace_does_not_see_is_refused(function: Function, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        lipfast.upper_bound(Model(function).eval(), X[:2])


def test_the_output_that_differs_is_named() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = 2 * x[:, :3]
            y.data = 3 * y.detach()
            return x, y

    with pytest.raises(TraceError, match=r"output 1 \(of shape \(3,\) for each sample\) differs"):
        lipfast.upper_bound(Two(), X)


def test_everything_is_as_it_was() -> None:
    model = Model(lambda m, x: x * m.source.random() * random.random() * np.random.rand())
    generators = model.source.getstate(), random.getstate(), np.random.get_state()[2]
    state = torch.get_rng_state()
    with pytest.raises(TraceError):
        lipfast.upper_bound(model, X)
    assert model.training
    assert generators == (model.source.getstate(), random.getstate(), np.random.get_state()[2])
    assert torch.equal(state, torch.get_rng_state())


class Shorter(nn.Module):
    """Rounds to fewer digits inside."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype = nn.Linear(4, 4), dtype

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.to(self.dtype)
        return functional.linear(x.to(self.dtype), weight).to(x.dtype).sin()


def deep() -> nn.Module:
    """With rounding errors far above a few units in the last place."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(40)]
    for layer in layers:
        nn.init.normal_(layer[0].weight, std=0.3)
    return nn.Sequential(nn.Linear(4, 64), *layers, nn.Linear(64, 2))


class Tables(nn.Module):
    """Numbers that are computed in the dtype of the samples, and a dimension that may vanish."""

    def forward(self, x: Tensor) -> Tensor:
        table = torch.linspace(-1, 1, 4, dtype=x.dtype).cos() / 3
        y = x
        for _ in range(60):
            y = (1.5 * y + table).sin() + torch.full_like(x, 0.1)
        return y[:, :1].squeeze()


def positions(model: Any, x: Tensor) -> Tensor:
    table = torch.arange(4, device=x.device).float().sin() / 3
    return model.layer(x * table.to(x.dtype))


NUMBERS_OF_A_DTYPE: dict[str, Function] = {
    "tensor": lambda m, x: m.layer(x) * torch.tensor(0.1, dtype=x.dtype),
    "new": lambda m, x: m.layer(x) * x.new_tensor([0.1, 0.2, 0.3, 0.7]),
    "eps": lambda m, x: functional.layer_norm(m.layer(x), (4,), eps=torch.finfo(x.dtype).eps),
    "positions": positions,
}


HONEST: dict[str, Callable[[], nn.Module]] = {
    "deep": deep,
    "tables": Tables,
    "shorter": lambda: Shorter(torch.bfloat16),
    "longer": lambda: Shorter(torch.float64),
    "softplus": lambda: nn.Sequential(nn.Linear(4, 4), nn.Softplus(beta=3.0)),
    "no eps": lambda: nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4)),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)),
    "logarithm": lambda: Model(lambda m, x: (x.exp() + 1e-3).log()),
    "alone": lambda: Model(lambda m, x: m.layer(x) if x.shape[0] > 0 else x),
    "positions": lambda: Model(positions),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST)
def test_rounding_is_no_difference(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    model = make().to(dtype).eval()
    assert lipfast.compile(model, X.to(dtype)).output_shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", NUMBERS_OF_A_DTYPE.values(), ids=NUMBERS_OF_A_DTYPE)
def test_numbers_that_depend_on_the_dtype_are_no_difference(
    function: Function, dtype: torch.dtype
) -> None:
    def written(model: Any, x: Tensor) -> Tensor:
        y = function(model, x)
        y.data = 1.01 * y.detach()
        return y

    x = X.to(dtype)
    assert lipfast.compile(Model(function).to(dtype), x).output_shapes
    with pytest.raises(TraceError, match="differs"):
        lipfast.compile(Model(written).to(dtype), x)
