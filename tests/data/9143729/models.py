"""The models of the plans and checkpoints in this folder; weights come from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm


def mlp(width: int, bias: bool = True) -> nn.Module:
    inner = nn.Linear(width, width, bias)
    return nn.Sequential(
        nn.Linear(4, width, bias), nn.ReLU(), inner, nn.Tanh(), nn.Linear(width, 3, bias)
    )


def chain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.LeakyReLU(0.1),
        nn.Linear(5, 3),
    )


class Residual(nn.Module):
    """Two blocks with BatchNorm, the second one with a stride and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.first = self.branch(4, 4, 1)
        self.second, self.shortcut = self.branch(4, 6, 2), nn.Conv2d(4, 6, 1, stride=2)
        self.head = nn.Linear(6, 3)

    @staticmethod
    def branch(inputs: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.first(x)).relu()
        x = (self.shortcut(x) + self.second(x)).relu()
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention with two heads and a multilayer perceptron, each behind a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.mlp = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def computed() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), weight_norm(nn.Linear(6, 3)))


EXAMPLES = {
    "chain": (chain, (2, 4, 4)),
    "residual": (Residual, (2, 8, 8)),
    "attention": (Attention, (4, 6)),
    "computed": (computed, (4,)),
}
"""Name of a plan -> what makes its model, shape of one sample."""


def model(name: str) -> nn.Module:
    """The model, in eval mode; weights random, and so are BatchNorm's statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = EXAMPLES[name][0]().eval()
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return made


def samples(name: str) -> Tensor:
    count = 5 * torch.Size(EXAMPLES[name][1]).numel()
    return torch.linspace(-1.0, 1.0, count).square().reshape(5, *EXAMPLES[name][1])
