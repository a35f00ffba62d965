"""Convolutions as explicit matrices, and their symbols, in float64: the truth of `conv_norms`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pads = Sequence[tuple[int, int]]


def conv_matrix(
    kernel: Tensor,
    input_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Pads,
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    r"""The matrix of $x \mapsto \mathrm{conv}(\mathrm{pad}(x))$, torch's own convolution.

    Args:
        kernel: (C_out, C_in / groups, \*kernel size).
        input_size: one per axis.
        stride: one per axis.
        dilation: one per axis.
        padding: (left, right) per axis; negative numbers crop (zeros only).
        groups: as in torch.
        padding_mode: "zeros", "circular", "reflect" or "replicate".

    Returns:
        (C_out \* output positions, C_in \* input positions), float64.

    Example:
        >>> import torch
        >>> conv_matrix(
        ...     torch.tensor([[[1.0, 2.0]]]), (3,), stride=(1,), padding=[(0, 0)], dilation=(1,)
        ... )
        tensor([[1., 2., 0.],
                [0., 1., 2.]], dtype=torch.float64)
    """
    basis = _basis(kernel.shape[1] * groups, input_size)
    flat = [side for pair in reversed(padding) for side in pair]
    if any(flat):
        mode = "constant" if padding_mode == "zeros" else padding_mode
        basis = torch.nn.functional.pad(basis, flat, mode=mode)
    none = (0,) * len(input_size)
    options = (tuple(stride), none, tuple(dilation), False, none, groups)
    return torch.convolution(basis, kernel.double(), None, *options).flatten(1).T


def _basis(channels: int, input_size: Sequence[int]) -> Tensor:
    count = channels * math.prod(input_size)
    return torch.eye(count, dtype=torch.float64).reshape(count, channels, *input_size)


def transposed_conv_matrix(
    kernel: Tensor,
    input_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """The matrix of torch's transposed convolution; kernel (C_in, C_out / groups, ...).

    Example:
        >>> import torch
        >>> transposed_conv_matrix(
        ...     torch.tensor([[[1.0, 2.0]]]),
        ...     (2,),
        ...     stride=(1,),
        ...     padding=(0,),
        ...     output_padding=(0,),
        ...     dilation=(1,),
        ... )
        tensor([[1., 0.],
                [2., 1.],
                [0., 2.]], dtype=torch.float64)
    """
    basis, more = _basis(kernel.shape[0], input_size), tuple(output_padding)
    options = (tuple(stride), tuple(padding), tuple(dilation), True, more, groups)
    return torch.convolution(basis, kernel.double(), None, *options).flatten(1).T


def polyphase(kernel: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    r"""The taps of the stride-1 convolution that acts on the polyphase components of the input.

    With g = gcd(stride, dilation), tap k of an axis is tap k // (stride / g) of component
    k mod (stride / g); zeros fill up. On the infinite grid the two have the same norm.

    Args:
        kernel: (rows, cols, \*kernel size).
        stride: one per axis.
        dilation: one per axis.

    Returns:
        (\*taps per axis, rows, cols \* components).

    Example:
        >>> import torch
        >>> polyphase(torch.tensor([[[1.0, 2.0, 3.0]]]), (2,), (1,))
        tensor([[[1., 2.]],
        <BLANKLINE>
                [[3., 0.]]])
    """
    rows, cols, *sizes = kernel.shape
    steps = [s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True)]
    taps = [-(-size // step) for size, step in zip(sizes, steps, strict=True)]
    padded = kernel.new_zeros(
        (rows, cols, *(tap * step for tap, step in zip(taps, steps, strict=True)))
    )
    padded[(slice(None), slice(None), *(slice(size) for size in sizes))] = kernel
    shape = [number for pair in zip(taps, steps, strict=True) for number in pair]
    axes = len(sizes)
    order = [2 + 2 * axis for axis in range(axes)]
    components = [3 + 2 * axis for axis in range(axes)]
    split = padded.reshape(rows, cols, *shape).permute(*order, 0, 1, *components)
    return split.reshape(*taps, rows, cols * math.prod(steps))


def symbol(taps: Tensor, frequency: Sequence[float]) -> Tensor:
    r"""$\hat W(\theta) = \sum_k W_k e^{2 \pi i k \cdot f}$ for taps (\*K, rows, cols), f in cycles.

    Example:
        >>> import torch
        >>> symbol(torch.ones(2, 1, 1), [0.0])
        tensor([[2.+0.j]], dtype=torch.complex128)
    """
    result = torch.zeros(taps.shape[-2:], dtype=torch.complex128)
    for index in itertools.product(*(range(size) for size in taps.shape[:-2])):
        phase = 2 * math.pi * sum(k * f for k, f in zip(index, frequency, strict=True))
        result += taps[index].double() * complex(math.cos(phase), math.sin(phase))
    return result


def symbol_maximum(taps: Tensor, points: int) -> float:
    r"""Largest $\sigma_{\max}(\hat W)$ on a grid of `points` frequencies per axis: below the sup.

    Example:
        >>> import torch
        >>> symbol_maximum(torch.ones(3, 1, 1), 4)
        3.0
    """
    axes = taps.dim() - 2
    grid = itertools.product(range(points), repeat=axes)
    return max(
        float(torch.linalg.svdvals(symbol(taps, [p / points for p in index]))[0]) for index in grid
    )
