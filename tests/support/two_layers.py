"""Two scaled identities, whose product and sum are known, in a model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lipfast


class TwoLayers(nn.Module):
    """Two scaled identities and whatever is made of them."""

    def __init__(self, scales: tuple[float, float], make: Callable[..., object]) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(4, 4, bias=False) for _ in range(2))
        for layer, scale in zip((self.a, self.b), scales, strict=True):
            layer.weight.data.copy_(scale * torch.eye(4))
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(x, self.a, self.b)


def bound(
    scales: tuple[float, float], make: Callable[..., object], **options: object
) -> lipfast.UpperBound:
    return lipfast.upper_bound(TwoLayers(scales, make), torch.zeros(1, 4), **options)  # type: ignore[arg-type]


MODELS: dict[str, Callable[..., object]] = {
    "nested": lambda x, a, b: x + a(x + 2.0 * b(x)),
    "twice the same": lambda x, a, b: b(a(x) + a(x)),
    "difference": lambda x, a, b: a(x) - 0.5 * b(x),
    "maximum": lambda x, a, b: torch.maximum(a(x), b(a(x))),
    "outputs": lambda x, a, b: (a(x), b(a(x)), x),
    "constant operand": lambda x, a, b: b(torch.maximum(a(x), torch.ones(4))),
}
