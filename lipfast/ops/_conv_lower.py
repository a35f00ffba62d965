"""The lower side of `conv_norms`: Lanczos with a convolution and its adjoint, and its proof."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.ops._conv_operator import ConvOperator
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma

_BASIS = 64
# Passes before the gap to the second Ritz value is believed.
_TRUSTED = 8


def plane_wave(
    convolution: ConvOperator, symbol_vector: Tensor, theta: Tensor, group: int
) -> Tensor:
    """Where the symbol's maximum is nearly attained on the true input size, or zeros.

    The real part of v e^{i theta.x}, v the right singular vector of the symbol, under half a period
    of a sine per axis for zero padding: what the top vector of a truncated Toeplitz matrix is.

    Args:
        convolution: of any stride without dilation, or of stride 1.
        symbol_vector: (cols,), complex: the channels of every polyphase component.
        theta: radians per tap, one per axis.
        group: whose channels v belongs to.
    """
    _, channels = convolution.channels
    steps = convolution.stride
    wave = torch.zeros(channels, *convolution.input_size, dtype=torch.float64, device="cpu")
    if any(s > 1 and d > 1 for s, d in zip(steps, convolution.dilation, strict=True)):
        return wave
    cols = convolution.weight.shape[1]
    vector = symbol_vector.reshape(cols, *steps)
    phase = torch.zeros(convolution.input_size, dtype=torch.float64, device="cpu")
    window = torch.ones(convolution.input_size, dtype=torch.float64, device="cpu")
    components = []
    for axis, size in enumerate(convolution.input_size):
        shape = [1] * convolution.axes
        shape[axis] = size
        position = torch.arange(size, device="cpu") + convolution.pads[axis][0]
        block = position.div(steps[axis], rounding_mode="floor").double()
        if convolution.stride[axis] == 1:
            block = block / convolution.dilation[axis]
        phase = phase + (theta[axis] * block).reshape(shape)
        components.append(position % steps[axis])
        if convolution.mode == "zeros":
            bump = torch.sin(math.pi * (torch.arange(size, device="cpu") + 1) / (size + 1)).double()
            window = window * bump.reshape(shape)
    for axis, component in enumerate(components):
        vector = vector.index_select(1 + axis, component)
    wave[group * cols : (group + 1) * cols] = (vector * torch.polar(window, phase)).real
    return wave


def top_vector(
    convolution: ConvOperator, start: Tensor, *, tolerance: float, max_passes: int, memory: int
) -> tuple[Tensor, int]:
    """A right singular vector of the largest singular value, by Lanczos on A^T A.

    Args:
        convolution: A.
        start: (C_in, *input_size), float64, not zero.
        tolerance: on the relative error that the residual promises for the singular value's square.
        max_passes: products with A^T A.
        memory: bytes that the basis may take.

    Returns:
        The vector, float64, and the number of passes.
    """
    # Single precision leaves about 1e-6 of the value.
    single = convolution.weight.dtype == torch.float32 and tolerance > 2e-5
    dtype = torch.float32 if single else torch.float64
    weight = _scaled(convolution.weight)[0].to(dtype)
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
            image = convolution.adjoint(convolution.forward(q, weight), weight).reshape(-1)
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


def _scaled(weight: Tensor) -> tuple[Tensor, int]:
    """2^-e W in float64, the largest magnitude in [1/2, 1), and e."""
    largest = float(weight.abs().max())
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    half = exponent // 2  # 2^1074 is no float64
    return weight.double() * 2.0**-half * 2.0 ** -(exponent - half), exponent


def lower_bound(
    convolution: ConvOperator, start: Tensor, *, tolerance: float, max_passes: int, memory: int
) -> tuple[float, Tensor, Tensor, int]:
    """Proved lower bound, its unit right vector, the image's direction, and the passes."""
    vector, passes = top_vector(
        convolution, start, tolerance=tolerance, max_passes=max_passes, memory=memory
    )
    lower, image = certified_lower(convolution, vector, memory)
    image = image.reshape(convolution.channels[0], *convolution.output_size)
    return lower, vector / vector.norm(), image, passes


def certified_lower(convolution: ConvOperator, vector: Tensor, memory: int) -> tuple[float, Tensor]:
    r"""Proved lower bound of the operator's norm from any vector x, and the image's direction.

    $\frac{\|y\| (1 - \gamma_{n+4}) - \gamma_{kc+2} \|P\| \phi \|x\|}{\|x\| (1 + \gamma_{m+4})}$
    with y = fl(A x), k taps, c channels per group, $\|P\| \phi$ a bound of the norm of the map with
    the magnitudes of all taps.
    """
    weight, exponent = _scaled(convolution.weight)
    y = convolution.exact_taps_image(vector, weight, memory)
    size, image = float((vector * vector).sum().sqrt()), float((y * y).sum().sqrt())
    if not (size > 1e-100 and image > 1e-100):
        return 0.0, y.zero_()
    magnitudes = weight.abs().flatten(2).sum(2)
    grouped = magnitudes.reshape(convolution.groups, -1, magnitudes.shape[1])
    rows, columns = float(grouped.sum(2).max()), float(grouped.sum(1).max())
    factor, _ = convolution.padding_factor()
    most = math.sqrt(rows * columns) * factor * WIDE
    terms = weight[0].numel()
    own, error = wide_gamma(y.numel() + 4), wide_gamma(terms + 2) * most * size
    numerator = image * (1 - own) - error - 2.0**-900
    denominator = size * (1 + wide_gamma(vector.numel() + 4))
    value = numerator / denominator * (1 - 8 * UNIT_ROUNDOFF)
    return _scaled_down(max(value, 0.0), exponent), y / image


def _scaled_down(value: float, exponent: int) -> float:
    """2^exponent value, rounded down where it is denormal."""
    try:
        scaled = math.ldexp(value, exponent)
    except OverflowError:
        return 1.7976931348623157e308
    return math.nextafter(scaled, 0.0) if 0 < scaled < 2.0**-1021 else scaled
