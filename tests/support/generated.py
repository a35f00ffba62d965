"""Modules that are put together at random from what people write, with explicit derivatives.

Every block takes rows of `SIZE` numbers to rows of `SIZE` numbers. `PLAIN` blocks treat samples
apart, leave the module alone and are differentiated rightly by autograd; each of the others breaks
one of these promises.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that torch users know)
from torch import Tensor, nn

SIZE = 4


class Block(nn.Module):
    """A block with a weight (SIZE, SIZE), a gain (SIZE,) and buffers to play with."""

    scale: Tensor
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE) / 2)
        self.gain = nn.Parameter(torch.rand(SIZE) + 0.5)
        self.register_buffer("scale", torch.rand(SIZE) + 0.5)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.plain = torch.randn(SIZE, SIZE) / 2


class Linear(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.gain)


class PlainWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.plain)


class RankThreeProduct(Block):
    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(1) @ self.weight.reshape(1, SIZE, SIZE)).squeeze(1)


class ExpandedConstant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x / torch.full((x.shape[0], 1), 2.0, dtype=x.dtype) + self.scale.expand_as(x)


class ClassToken(Block):
    def forward(self, x: Tensor) -> Tensor:
        token = self.gain.reshape(1, 1, SIZE).expand(x.shape[0], -1, -1)
        tokens = torch.cat([token, x.unsqueeze(1)], 1) @ self.weight
        return tokens[:, 0] + torch.tanh(tokens[:, 1])


class MaskedFill(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.mask, 0.0) + self.gain


class MaxMin(Block):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([torch.max(first, second), torch.min(first, second)], 1)


class HandWrittenSilu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HandWrittenGelu(Block):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


class Residual(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(F.linear(x, self.weight))


class Halves(Block):
    def forward(self, x: Tensor) -> Tensor:
        first, second = x[:, :2], x[:, 2:]
        return torch.cat([first @ self.weight[:2, :2], torch.relu(second @ self.weight[2:, 2:])], 1)


class CircularConvolution(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.unsqueeze(1)).squeeze(1)
        return out


class NormalizedWeight(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.normalize(self.weight, dim=1))


class ExtraState(Linear):
    def get_extra_state(self) -> object:
        return {"steps": 3, "name": "extra"}

    def set_extra_state(self, state: object) -> None:
        del state


class Norms(Block):
    def __init__(self) -> None:
        super().__init__()
        self.batch, self.layer = nn.BatchNorm1d(SIZE), nn.LayerNorm(SIZE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.batch(x) + 0.1 * self.layer(x)
        return out


class NestedGradient(Block):
    """The gradient of a potential, by `torch.func`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda value: torch.tanh(value @ self.weight).sum())(x)


class ForwardDerivative(Block):
    def forward(self, x: Tensor) -> Tensor:
        def function(value: Tensor) -> Tensor:
            return torch.tanh(value @ self.weight)

        found: Tensor = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return found


class SparseProduct(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.plain.to(x.dtype).to_sparse(), x.T).T


class CachedWeight(Block):
    """Keeps a computed weight, which is no leaf of autograd, beside the parameters."""

    def forward(self, x: Tensor) -> Tensor:
        self.computed = self.weight / self.weight.norm()
        self.seen = [*getattr(self, "seen", []), x.shape]
        return F.linear(x, self.computed)


class ClippedData(Block):
    """Clips its weight behind autograd's back."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.3, 0.3)
        return F.linear(x, self.weight)


class CountingBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count.data.add_(1.0)
        return F.linear(x, self.weight)


class FirstBatchSetsScale(Block):
    """Data-dependent initialisation: its first batch decides on the gain."""

    initialised = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self.gain.data.copy_(1.0 / (0.5 + x.detach().abs().mean(0)))
            self.initialised = True
        return x * self.gain


class NoGradBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = F.linear(x, self.weight)
        return hidden + 0.1 * x


class Detached(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + (0.5 * x).detach()


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -10.0 * gradients[0]


class Reversal(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Reversal.apply(x)
        return out + 0.1 * x


class CentredBatch(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class BatchStatistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(SIZE, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x)
        return out


class BatchCondition(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else 2.0 * x


class SwappedAttention(Block):
    """Attention over the samples."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.T, 1) @ x


class AlwaysDropout(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Noise(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + 0.1 * torch.randn_like(x))


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.Identity),
    lambda: nn.Threshold(0.0, 0.0),
)
PLAIN: tuple[Callable[[], nn.Module], ...] = (
    *(Linear, PlainWeight, RankThreeProduct, ExpandedConstant, ClassToken, MaskedFill, MaxMin),
    *(HandWrittenSilu, HandWrittenGelu, Residual, Halves, CircularConvolution, NormalizedWeight),
    *(ExtraState, Norms, NestedGradient, ForwardDerivative, SparseProduct, CachedWeight),
)
WRITING = (ClippedData, CountingBuffer, FirstBatchSetsScale)
BLOCKED = (NoGradBranch, Detached, Reversal)
MIXING = (CentredBatch, BatchStatistics, BatchCondition, SwappedAttention)
RANDOM = (AlwaysDropout, Noise)
HARMFUL: tuple[tuple[type[Block], ...], ...] = (WRITING, BLOCKED, MIXING, RANDOM)


@dataclass(frozen=True)
class Generated:
    """A module, its samples, and which promises it keeps.

    Attributes:
        module: in training mode, in float32 or float64.
        x: (B, SIZE).
        harmful: the one block that breaks a promise, None for a module that keeps all.
    """

    module: nn.Sequential
    x: Tensor
    harmful: type[Block] | None

    def __str__(self) -> str:
        return " ".join(type(block).__name__ for block in self.module) + f" {self.x.dtype}"


def generate(seed: int) -> Generated:
    """The module of a seed; every other one holds a block that breaks a promise."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    blocks: list[nn.Module] = []
    for _ in range(choose.randint(1, 3)):
        blocks += [choose.choice(PLAIN)(), choose.choice(ACTIVATIONS)()]
    harmful = choose.choice(choose.choice(HARMFUL)) if seed % 2 else None
    if harmful is not None:
        blocks.insert(choose.randint(0, len(blocks)), harmful())
    module = nn.Sequential(*blocks)
    x = torch.randn(choose.randint(1, 4), SIZE)
    if choose.random() < 0.5:
        x = x.double()
        module.double()
        for block in module:
            if isinstance(block, Block):
                block.plain = block.plain.double()
    return Generated(module, x, harmful)


def difference_jacobians(module: nn.Module, x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences (B, K, D) in float64, one sample at a time, of a fresh copy each time.

    What a module does to itself, to other samples and to autograd does not count.
    """
    wide = copy.deepcopy(module).double().eval()
    for part in wide.modules():
        if isinstance(part, Block):
            part.plain = part.plain.double()

    def value(point: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = copy.deepcopy(wide)(point[None])[0]
        return found.flatten()

    rows = []
    for sample in x.double():
        moves = step * torch.eye(sample.numel(), dtype=torch.float64)
        columns = [(value(sample + move) - value(sample - move)) / (2 * step) for move in moves]
        rows.append(torch.stack(columns, 1))
    return torch.stack(rows)
