"""The convolutional network of the width studies."""

from __future__ import annotations

from torch import nn

from experiments.models.dropout import SeededDropout
from lipfast.errors import ArgumentError


def cnn(  # noqa: PLR0917  # called by keyword
    width: int,
    channels: int = 3,
    image_size: int = 32,
    classes: int = 10,
    bias: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """Build four 3x3 convolutions of `width` times 1, 2, 4, 8 channels and a linear layer.

    Each convolution is followed by a ReLU and a max-pool of 1, 2, 2 and whatever is left (8 for
    images of 32, 7 for 28, 3 for 14), so that one pixel remains (Khromov and Singh, 2024).

    Args:
        width: channels of the first convolution.
        channels: of the images.
        image_size: height and width of the images, at least 4.
        classes: dimension of the output.
        bias: whether the layers have biases.
        dropout: probability, before the linear layer.

    Returns:
        The network; maps (batch, channels, image_size, image_size) to (batch, classes).

    Raises:
        ArgumentError: a size is too small.

    Example:
        >>> sum(p.numel() for p in cnn(width=2, channels=1, image_size=14).parameters())
        1690
    """
    sizes = {"width": width, "channels": channels, "classes": classes}
    for name, size in sizes.items():
        if size < 1:
            raise ArgumentError(f"{name} is {size}; it must be at least 1")
    if image_size < 4:
        raise ArgumentError(f"image_size is {image_size}; it must be at least 4")
    modules: list[nn.Module] = []
    before = channels
    for factor, pool in ((1, 1), (2, 2), (4, 2), (8, image_size // 4)):
        after = factor * width
        modules += [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.ReLU()]
        modules += [nn.MaxPool2d(pool)] if pool > 1 else []
        before = after
    modules += [nn.Flatten(), *([SeededDropout(dropout)] if dropout else [])]
    return nn.Sequential(*modules, nn.Linear(before, classes, bias=bias))
