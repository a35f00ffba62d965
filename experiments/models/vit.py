"""A small vision transformer (Dosovitskiy et al., 2021; mean pooling: Beyer et al., 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.models.dropout import SeededDropout
from lipfast.errors import ArgumentError


class Attention(nn.Module):
    """Multi-head self-attention after a LayerNorm.

    Args:
        features: of a token.
        heads: how many.
        head_features: of each of them.
    """

    def __init__(self, features: int, heads: int, head_features: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(features)
        self.qkv = nn.Linear(features, 3 * heads * head_features, bias=False)
        self.out = nn.Linear(heads * head_features, features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on (batch, tokens, features)."""
        batch, tokens, _ = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (p.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for p in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return output


class Block(nn.Module):
    """Residual attention, then a residual two-layer network of 4 times the features."""

    def __init__(self, features: int, heads: int, head_features: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(features, heads, head_features)
        self.mlp = nn.Sequential(
            nn.LayerNorm(features),
            nn.Linear(features, 4 * features),
            nn.GELU(),
            *([SeededDropout(dropout)] if dropout else []),
            nn.Linear(4 * features, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on (batch, tokens, features)."""
        x = x + self.attention(x)
        output: Tensor = x + self.mlp(x)
        return output


class VisionTransformer(nn.Module):
    """Patches, learned positions, pre-normalised blocks, mean over tokens, a linear layer."""

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        heads: int,
        head_features: int,
        patch: int,
        channels: int,
        image_size: int,
        classes: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(
            *(Block(width, heads, head_features, dropout) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate on images."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        output: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return output


def vit(  # noqa: PLR0917  # called by keyword
    width: int,
    depth: int = 6,
    heads: int = 6,
    head_features: int = 64,
    patch: int = 8,
    channels: int = 3,
    image_size: int = 32,
    classes: int = 10,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Build a vision transformer of `depth` blocks on tokens of `width` features.

    Args:
        width: features of a token; the inner networks have 4 times as many.
        depth: number of blocks.
        heads: of the attention.
        head_features: of each head.
        patch: height and width of a patch; divides `image_size`.
        channels: of the images.
        image_size: height and width of the images.
        classes: dimension of the output.
        dropout: probability, inside the two-layer networks.

    Returns:
        The network; maps (batch, channels, image_size, image_size) to (batch, classes).

    Raises:
        ArgumentError: a size is below 1, or the patch does not divide the image.

    Example:
        >>> vit(12, depth=1, patch=4, channels=1, image_size=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    sizes = {"width": width, "depth": depth, "heads": heads, "head_features": head_features}
    for name, size in {**sizes, "patch": patch, "channels": channels, "classes": classes}.items():
        if size < 1:
            raise ArgumentError(f"{name} is {size}; it must be at least 1")
    if image_size < patch or image_size % patch:
        raise ArgumentError(f"image_size is {image_size}; it must be a multiple of patch ({patch})")
    return VisionTransformer(
        width,
        depth,
        heads=heads,
        head_features=head_features,
        patch=patch,
        channels=channels,
        image_size=image_size,
        classes=classes,
        dropout=dropout,
    )
