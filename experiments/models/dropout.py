"""Dropout that draws from a generator of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SeededDropout(nn.Module):
    """`x m / (1 - p)` with m Bernoulli(1 - p) while training, the identity in eval mode.

    `nn.Dropout` draws from the global generator, which networks that train side by side share;
    this one draws from `generator`.

    Args:
        p: probability that an activation is dropped, in [0, 1).

    Attributes:
        generator: None until it is set; then the global one is not touched.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Drop while training."""
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep / (1 - self.p)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"p={self.p}"
