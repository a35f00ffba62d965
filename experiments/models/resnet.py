"""Residual networks (He et al., 2016): CIFAR style of depth 18, 20, 56, ImageNet style of 50."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from experiments.models.dropout import SeededDropout
from lipfast.errors import ArgumentError

# Depth to (blocks per stage, channels of the first stage over width, bottleneck).
_LAYOUTS: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    20: ((3, 3, 3), False),
    50: ((3, 4, 6, 3), True),
    56: ((9, 9, 9), False),
}
DEPTHS = tuple(_LAYOUTS)


class ResidualBlock(nn.Module):
    """`relu(branch(x) + shortcut(x))`: two 3x3 convolutions, or 1x1, 3x3, 1x1 (bottleneck).

    Args:
        before: input channels.
        channels: of the 3x3 convolutions.
        stride: of the (first) 3x3 convolution.
        bottleneck: whether the output has 4 times as many channels.
    """

    def __init__(self, before: int, channels: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        after = 4 * channels if bottleneck else channels
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        sizes = (before, *[channels] * (len(kernels) - 1), after)
        layers: list[nn.Module] = []
        for index, kernel in enumerate(kernels):
            step = stride if index == (1 if bottleneck else 0) else 1
            layers += [
                nn.Conv2d(
                    sizes[index], sizes[index + 1], kernel, step, padding=kernel // 2, bias=False
                ),
                nn.BatchNorm2d(sizes[index + 1]),
                nn.ReLU(),
            ]
        self.branch = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the block."""
        return functional.relu(self.branch(x) + self.shortcut(x))


def resnet(  # noqa: PLR0917  # called by keyword
    width: int = 16,
    depth: int = 20,
    channels: int = 3,
    classes: int = 10,
    dropout: float = 0.0,
    image_size: int = 32,
) -> nn.Sequential:
    """Build a residual network with a 3x3 stem (7x7 of stride 2 and a max-pool for large images).

    Weights start as PyTorch's layers do; the convolutions of depth 50 start, as is usual for it,
    normal with variance 2/fan-out (He et al., 2015).

    Args:
        width: channels of the first stage; 16 is the usual one of depth 20 and 56, 64 of 18 and 50.
        depth: 18, 20, 50 (bottleneck) or 56.
        channels: of the images.
        classes: dimension of the output.
        dropout: probability, before the linear layer.
        image_size: from 128 on, the stem is that of ImageNet.

    Returns:
        The network; maps (batch, channels, height, width) to (batch, classes).

    Raises:
        ArgumentError: another depth, or a size below 1.

    Example:
        >>> sum(p.numel() for p in resnet(16, 20).parameters()) # He et al.: 0.27M
        272474
    """
    if depth not in _LAYOUTS:
        raise ArgumentError(f"depth is {depth}; a resnet has one of {', '.join(map(str, DEPTHS))}")
    if min(width, channels, classes) < 1:
        raise ArgumentError(f"width is {width}, channels {channels}, classes {classes}; 1 or more")
    blocks, bottleneck = _LAYOUTS[depth]
    large = image_size >= 128
    stem = nn.Conv2d(channels, width, 7, 2, 3, bias=False) if large else None
    modules: list[nn.Module] = [
        stem or nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *([nn.MaxPool2d(3, 2, 1)] if large else []),
    ]
    before = width
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        for index in range(count):
            stride = 2 if stage > 0 and index == 0 else 1
            modules.append(ResidualBlock(before, inner, stride, bottleneck=bottleneck))
            before = 4 * inner if bottleneck else inner
    modules += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    modules += [SeededDropout(dropout)] if dropout else []
    model = nn.Sequential(*modules, nn.Linear(before, classes))
    if bottleneck:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return model
