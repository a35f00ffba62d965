"""Where a convolution's norm is nearly attained: vectors and frequencies, which prove nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_upper import SymbolProof

_BASIS = 64
# Passes before the gap to the second Ritz value is believed.
_TRUSTED = 8
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
    theta = torch.zeros(conv.axes, dtype=torch.float64, device="cpu")
    for position, axis in enumerate(conv.tap_axes()):
        theta[axis] = 2 * math.pi * frequency[position]
    real, imaginary = (left if conv.transposes_taps() else right).chunk(2)
    vector = torch.complex(real, -imaginary if conv.transposes_taps() else imaginary)
    header = torch.tensor([float(group)], dtype=torch.float64, device="cpu")
    return SymbolMaximum(torch.cat([header, frequency, left]), group, theta, vector)


def _plane_wave(conv: ConvOperator, maximum: SymbolMaximum) -> Tensor:
    """Where the symbol's maximum is nearly attained on the true input size.

    The real part of v e^{i theta.x}, v the right singular vector of the symbol, under half a period
    of a sine per axis for zero padding: what the top vector of a truncated Toeplitz matrix is. Of
    strides with dilations, zeros.
    """
    _, channels = conv.channels
    steps = conv.stride
    wave = torch.zeros(channels, *conv.input_size, dtype=torch.float64, device="cpu")
    if any(s > 1 and d > 1 for s, d in zip(steps, conv.dilation, strict=True)):
        return wave
    cols = conv.weight.shape[1]
    vector = maximum.vector.reshape(cols, *steps)
    phase = torch.zeros(conv.input_size, dtype=torch.float64, device="cpu")
    window = torch.ones(conv.input_size, dtype=torch.float64, device="cpu")
    components = []
    for axis, size in enumerate(conv.input_size):
        shape = [1] * conv.axes
        shape[axis] = size
        position = torch.arange(size, device="cpu") + conv.pads[axis][0]
        block = position.div(steps[axis], rounding_mode="floor").double()
        if conv.stride[axis] == 1:
            block = block / conv.dilation[axis]
        phase = phase + (maximum.theta[axis] * block).reshape(shape)
        components.append(position % steps[axis])
        if conv.mode == "zeros":
            bump = torch.sin(math.pi * (torch.arange(size, device="cpu") + 1) / (size + 1)).double()
            window = window * bump.reshape(shape)
    for axis, component in enumerate(components):
        vector = vector.index_select(1 + axis, component)
    first = maximum.group * cols
    wave[first : first + cols] = (vector * torch.polar(window, phase)).real
    return wave


def first_vector(
    conv: ConvOperator, maximum: SymbolMaximum, begin: ConvStart | None, seed: int
) -> Tensor:
    """What `top_vector` starts from: an earlier vector, or the symbol's wave, and some noise."""
    _, channels = conv.channels
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn(
        (channels, *conv.input_size), generator=generator, dtype=torch.float64, device="cpu"
    )
    noise /= noise.norm()
    # A transposed convolution is kept as its adjoint.
    earlier = None if begin is None else begin.left if conv.transposed else begin.right
    if earlier is not None and bool(earlier.any()):
        first, share = earlier.double(), 1e-2
    else:
        first, share = _plane_wave(conv, maximum), 0.1
    size = float(first.norm())
    return first / size + share * noise if size > 0 else noise


def top_vector(
    conv: ConvOperator,
    weight: Tensor,
    start: Tensor,
    *,
    tolerance: float,
    max_passes: int,
    memory: int,
) -> tuple[Tensor, int]:
    """A right singular vector of the largest singular value, by Lanczos on A^T A.

    Args:
        conv: A.
        weight: that of A, scaled, float64.
        start: (C_in, *input_size), float64, not zero.
        tolerance: on the relative error that the residual promises for the singular value's square.
        max_passes: products with A^T A.
        memory: bytes that the basis may take.

    Returns:
        The vector, float64, and the number of passes.
    """
    # Single precision leaves about 1e-6 of the value.
    single = conv.weight.dtype == torch.float32 and tolerance > 2e-5
    dtype = torch.float32 if single else torch.float64
    weight = weight.to(dtype)
    shape, size = start.shape, start.numel()
    limit = max(3, min(_BASIS, size, memory // (size * weight.element_size() + 1)))
    vector, passes = start.reshape(-1).to(dtype), 0
    basis = torch.empty(limit, size, dtype=dtype, device="cpu")
    while True:
        basis[0] = vector / vector.norm()
        diagonal: list[float] = []
        off: list[float] = []
        while True:
            count = len(diagonal) + 1
            q = basis[count - 1].reshape(1, *shape)
            image = conv.adjoint(conv.forward(q, weight), weight).reshape(-1)
            passes += 1
            diagonal.append(float(torch.dot(basis[count - 1], image)))
            for _ in range(2):
                image = image - basis[:count].T @ (basis[:count] @ image)
            following = float(image.norm())
            value, ritz, error = _ritz(diagonal, off, following)
            done = error <= tolerance * value or passes >= max_passes or not following > 0
            if done or count == limit:
                break
            off.append(following)
            basis[count] = image / following
        vector = ritz.to(dtype) @ basis[: len(diagonal)]
        if done:
            return vector.double().reshape(shape), passes


def _ritz(diagonal: list[float], off: list[float], following: float) -> tuple[float, Tensor, float]:
    """Largest Ritz value, its vector, and an estimate of what is missing."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64, device="cpu"))
    if off:
        side = torch.tensor(off, dtype=torch.float64, device="cpu")
        matrix += torch.diag(side, 1) + torch.diag(side, -1)
    values, vectors = torch.linalg.eigh(matrix)
    residual = following * abs(float(vectors[-1, -1]))
    # A start close to another singular vector shows a small residual at first.
    if len(diagonal) < _TRUSTED:
        return float(values[-1]), vectors[:, -1], residual
    gap = float(values[-1] - values[-2])
    return float(values[-1]), vectors[:, -1], min(residual, residual**2 / max(gap, 1e-300))
