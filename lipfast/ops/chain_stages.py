"""The stages of a chain (affine maps, pools, pointwise activations) and the shapes between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lipfast.errors import ArgumentError
from lipfast.ops.chain_activations import ACTIVATIONS, ChainActivation


@dataclass(frozen=True)
class Linear:
    """z = W h + b on a flat sample; weight (n_out, n_in)."""


@dataclass(frozen=True)
class ConvStage:
    """Zero-padded convolution along one or two axes, as `torch.nn.functional.conv1d`, `conv2d`.

    Attributes:
        stride: one number per axis, as `padding` and `dilation`.
        padding: zeros on either side of an axis.
        dilation: distance of the kernel's taps.
        groups: blocks of channels that do not mix.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class MaxPool:
    """Maximum over windows, the first in ties, as `torch.nn.functional.max_pool1d` and `2d`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False


@dataclass(frozen=True)
class AveragePool:
    """Mean over windows, as `torch.nn.functional.avg_pool1d`, `avg_pool2d`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False
    count_include_pad: bool = True


@dataclass(frozen=True)
class Flatten:
    """A sample of any shape as one vector, row-major."""


@dataclass(frozen=True)
class Activation:
    """A pointwise function by its name in `ACTIVATIONS`, with autograd's derivative at kinks.

    Attributes:
        name: of the function.
        parameters: numbers for `ChainActivation.parameters`.
    """

    name: str
    parameters: tuple[float, ...] = ()

    @property
    def function(self) -> ChainActivation:
        """All that is known of it."""
        return ACTIVATIONS[self.name]


Stage: TypeAlias = Linear | ConvStage | MaxPool | AveragePool | Flatten | Activation
Shape: TypeAlias = tuple[int, ...]


def output_shape(stage: Stage, shape: Shape, weight: Shape | None = None) -> Shape:
    """Shape of a sample after a stage.

    Args:
        stage: the stage.
        shape: of a sample before it: (n,), (channels, length) or (channels, height, width).
        weight: shape of the stage's weight, for `Linear` and `ConvStage`.

    Raises:
        ArgumentError: the stage cannot follow a sample of this shape, or its numbers make no sense.

    Examples:
        >>> output_shape(ConvStage((2, 2), (1, 1), (1, 1)), (3, 32, 32), (8, 3, 3, 3))
        (8, 16, 16)
    """
    if isinstance(stage, Flatten):
        return (math.prod(shape),)
    if isinstance(stage, Activation):
        _check_activation(stage)
        return shape
    if isinstance(stage, Linear):
        if len(shape) != 1:
            raise ArgumentError(f"Linear takes a flat sample, got {shape}: put a Flatten before it")
        if weight is None or len(weight) != 2 or weight[1] != shape[0] or weight[0] < 1:
            raise ArgumentError(f"expected a weight (n_out, {shape[0]}), got {weight}")
        return (weight[0],)
    if len(shape) not in (2, 3):
        raise ArgumentError(
            f"{type(stage).__name__} takes samples (channels, length) or (channels, height, "
            f"width), got {shape}"
        )
    if isinstance(stage, ConvStage):
        return _convolved(stage, shape, weight)
    return _pooled(stage, shape)


def _check_activation(stage: Activation) -> None:
    if stage.name not in ACTIVATIONS:
        raise ArgumentError(
            f"unknown activation {stage.name!r}; there are {', '.join(ACTIVATIONS)}"
        )
    names = stage.function.parameters
    if len(stage.parameters) != len(names):
        raise ArgumentError(
            f"{stage.name} has the parameters ({', '.join(names)}), got {stage.parameters}"
        )
    if not all(math.isfinite(value) for value in stage.parameters):
        raise ArgumentError(f"{stage.name}: the parameters {stage.parameters} must be finite")


def _check_axes(stage: ConvStage | MaxPool | AveragePool, axes: int) -> None:
    for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
        values = getattr(stage, name, None)
        if values is not None and (len(values) != axes or min(values) < least):
            raise ArgumentError(
                f"{type(stage).__name__}: {name} must be {axes} numbers >= {least}, got {values}"
            )


def _convolved(stage: ConvStage, shape: Shape, weight: Shape | None) -> Shape:
    axes = len(shape) - 1
    _check_axes(stage, axes)
    groups = stage.groups
    if groups < 1 or shape[0] % groups:
        raise ArgumentError(f"groups = {groups} do not divide {shape[0]} channels")
    inputs = shape[0] // groups
    if weight is None or len(weight) != axes + 2 or weight[1] != inputs or min(weight) < 1:
        kernel = ", kernel" * axes
        raise ArgumentError(f"expected a weight (channels_out, {inputs}{kernel}), got {weight}")
    if weight[0] % groups:
        raise ArgumentError(f"groups = {groups} do not divide {weight[0]} output channels")
    sizes = [
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(
            shape[1:], weight[2:], stage.stride, stage.padding, stage.dilation, strict=True
        )
    ]
    return _with_channels(weight[0], sizes, stage, shape)


def _pooled(stage: MaxPool | AveragePool, shape: Shape) -> Shape:
    axes = len(shape) - 1
    _check_axes(stage, axes)
    dilations = stage.dilation if isinstance(stage, MaxPool) else (1,) * axes
    sizes = []
    for size, kernel, stride, padding, dilation in zip(
        shape[1:], stage.kernel_size, stage.stride, stage.padding, dilations, strict=True
    ):
        if 2 * padding > kernel:
            raise ArgumentError(f"padding {padding} is more than half of the window {kernel}")
        span = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (span + (stride - 1 if stage.ceil_mode else 0)) // stride + 1
        # The last window must start inside the input or its left padding.
        count -= stage.ceil_mode and (count - 1) * stride >= size + padding
        for start in range(-padding, count * stride - padding, stride):
            if not any(0 <= start + tap * dilation < size for tap in range(kernel)):
                raise ArgumentError(f"{stage}: a window lies wholly in the padding")
        sizes.append(count)
    return _with_channels(shape[0], sizes, stage, shape)


def _with_channels(channels: int, sizes: Sequence[int], stage: Stage, shape: Shape) -> Shape:
    if min(sizes) < 1:
        raise ArgumentError(f"{stage} leaves nothing of a sample of shape {shape}")
    return (channels, *sizes)


def is_affine(stage: Stage) -> bool:
    """Whether the stage has a weight."""
    return isinstance(stage, Linear | ConvStage)


# What the native op takes: these numbers per stage, and two parameters.
NUMBERS = 12
AFFINE_KINDS = (0, 1)
# Kernel sizes, strides, padding, dilation, groups and flags of a stage without windows.
_NO_WINDOW = (1, 1, 1, 1, 0, 0, 1, 1, 1, 0)
_KINDS = {Linear: 0, ConvStage: 1, MaxPool: 2, AveragePool: 3, Activation: 4, Flatten: 5}


def encode_activation(stage: Stage, otherwise: int) -> tuple[int, list[float]]:
    """The kernels' number of an activation, or another one for other stages; two parameters."""
    if not isinstance(stage, Activation):
        return otherwise, [0.0, 0.0]
    return stage.function.code, [float(value) for value in (*stage.parameters, 0.0, 0.0)][:2]


def encode_chain(
    stages: Sequence[Stage], weights: Sequence[Shape]
) -> tuple[list[int], list[float]]:
    """The stages as the native op takes them; one axis becomes a height of 1 and a width.

    Args:
        stages: stages that `output_shape` accepts one after another.
        weights: shapes of the affine stages' weights.
    """
    numbers: list[int] = []
    parameters: list[float] = []
    remaining = iter(weights)
    for stage in stages:
        weight = next(remaining) if is_affine(stage) else ()
        code, values = encode_activation(stage, 0)
        parameters += values
        if isinstance(stage, Linear | Activation | Flatten):
            numbers += [_KINDS[type(stage)], code, *_NO_WINDOW]
            continue
        axes = [_two(getattr(stage, name, ()), 1) for name in ("kernel_size", "stride")]
        axes += [_two(getattr(stage, "padding", ()), 0), _two(getattr(stage, "dilation", ()), 1)]
        if isinstance(stage, ConvStage):
            axes[0] = _two(weight[2:], 1)
        flags = getattr(stage, "count_include_pad", False) + 2 * getattr(stage, "ceil_mode", False)
        groups = getattr(stage, "groups", 1)
        numbers += [_KINDS[type(stage)], code, *(n for pair in axes for n in pair), groups, flags]
    return numbers, parameters


def _two(values: Sequence[int], default: int) -> tuple[int, int]:
    height, width = (default, default, *values)[-2:]
    return height, width
