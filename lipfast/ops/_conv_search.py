"""Where a convolution's norm is nearly attained: vectors and frequencies, which prove nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops._conv_lanczos import Start
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_upper import SymbolProof

# Lengths of the random part of a start, beside a vector found earlier, and beside a wave.
_BESIDE_EARLIER, _BESIDE_WAVE = 0.1, 1.0
# Numbers in front of the vector of `ConvStart.maximum`: group, frequency on three axes.
HEADER = 4


@dataclass(frozen=True, eq=False, repr=False)
class ConvStart:
    """What `conv_norms` found for one convolution, to begin with at similar weights.

    Attributes:
        right: right singular vector, shaped like the input.
        left: the image's direction, shaped like the output.
        maximum: where the symbol's maximum is.
        reference: a bound that was proved, and of which taps.
    """

    right: Tensor
    left: Tensor
    maximum: Tensor
    reference: SymbolProof | None


@dataclass(frozen=True)
class SymbolMaximum:
    """Where the norm of a convolution's symbol is largest, as far as was found.

    Attributes:
        start: what the native op starts from at similar weights: `HEADER` numbers, and a left
            singular vector of the taps: real parts, then imaginary parts.
        group: of channels.
        theta: radians per tap, one per axis of the kernel.
        vector: (cols,), complex, the symbol's right singular vector.
    """

    start: Tensor
    group: int
    theta: Tensor
    vector: Tensor


def symbol_maximum(
    conv: ConvOperator, group: int, frequency: Tensor, left: Tensor, right: Tensor
) -> SymbolMaximum:
    """What the native op found of `conv.taps()`, in terms of the kernel.

    Args:
        conv: the convolution.
        group: of channels.
        frequency: (3,), cycles per tap, axes with one tap last.
        left: singular vector (2 rows) of the taps' symbol: real parts, then imaginary parts.
        right: alike (2 cols).
    """
    theta = torch.zeros(conv.axes, dtype=torch.float64, device=left.device)
    for position, axis in enumerate(conv.tap_axes()):
        theta[axis] = 2 * math.pi * frequency[position]
    real, imaginary = (left if conv.transposes_taps() else right).chunk(2)
    vector = torch.complex(real, -imaginary if conv.transposes_taps() else imaginary)
    header = torch.tensor([float(group)], dtype=torch.float64, device=left.device)
    return SymbolMaximum(torch.cat([header, frequency, left]), group, theta, vector)


def plane_waves(conv: ConvOperator, theta: Tensor, vectors: Tensor) -> Tensor | None:
    """Where maxima of symbols are nearly attained on the true input size: (N, cols, *input_size).

    The real part of v e^{i theta.x}, v the right singular vector of the symbol, under half a period
    of a sine per axis for zero padding: what the top vector of a truncated Toeplitz matrix is. None
    for strides with dilations.

    Args:
        conv: one of the operators, all of one kind.
        theta: (N, axes), radians per tap.
        vectors: (N, cols of the symbol), complex.
    """
    steps = conv.stride
    device = vectors.device
    if any(s > 1 and d > 1 for s, d in zip(steps, conv.dilation, strict=True)):
        return None
    vectors = vectors.reshape(len(vectors), -1, *steps)
    phase = torch.zeros((len(theta), *conv.input_size), dtype=torch.float64, device=device)
    window = torch.ones(conv.input_size, dtype=torch.float64, device=device)
    components = []
    for axis, size in enumerate(conv.input_size):
        shape = [1] * conv.axes
        shape[axis] = size
        position = torch.arange(size, device=device) + conv.pads[axis][0]
        block = position.div(steps[axis], rounding_mode="floor").double()
        if conv.stride[axis] == 1:
            block = block / conv.dilation[axis]
        phase = phase + (theta[:, axis, None] * block).reshape(-1, *shape)
        components.append(position % steps[axis])
        if conv.mode == "zeros":
            places = torch.arange(size, device=device) + 1
            bump = torch.sin(math.pi * places / (size + 1)).double()
            window = window * bump.reshape(shape)
    for axis, component in enumerate(components):
        vectors = vectors.index_select(2 + axis, component)
    return (vectors * torch.polar(window.expand_as(phase), phase)[:, None]).real


def _plane_wave(conv: ConvOperator, maximum: SymbolMaximum) -> Tensor:
    """Among all channels the wave of the group with the maximum; zeros where there is none."""
    _, channels = conv.channels
    cols = conv.weight.shape[1]
    shape = channels, *conv.input_size
    wave = torch.zeros(shape, dtype=torch.float64, device=conv.weight.device)
    found = plane_waves(conv, maximum.theta[None], maximum.vector[None])
    if found is not None:
        first = maximum.group * cols
        wave[first : first + cols] = found[0]
    return wave


def first_vector(
    conv: ConvOperator, maximum: SymbolMaximum, begin: ConvStart | None, seed: int
) -> Start:
    """What `top_vector` starts from: an earlier vector, or the symbol's wave, and noise.

    Either may be orthogonal to the first singular vector, for symmetric kernels exactly.
    """
    _, channels = conv.channels
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(
        (channels, *conv.input_size), generator=generator, dtype=torch.float64, device="cpu"
    )
    noise = noise.div_(noise.norm()).to(conv.weight.device)
    # A transposed convolution is kept as its adjoint.
    earlier = None if begin is None else begin.left if conv.transposed else begin.right
    if earlier is not None and bool(earlier.any()):
        first, length = earlier.double(), _BESIDE_EARLIER
    else:
        first, length = _plane_wave(conv, maximum), _BESIDE_WAVE
    size = float(first.norm())
    if not size > 0:
        return Start(noise, 1.0)
    first = first / size
    # Of few entries the two might cancel.
    if float((first * noise).sum()) < 0:
        noise = -noise
    start = first + length * noise
    return Start(start, length**2 / float((start * start).sum()))
