"""Convolutions of every kind at small sizes, with the explicit matrices that are their truth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipfast.reference.conv_norms import conv_matrix, transposed_conv_matrix

MODES = ("zeros", "zeros", "circular", "reflect", "replicate")


@dataclass(frozen=True)
class Case:
    """A kernel, the options of `conv_norms`, and the matrix of torch's own operator."""

    kernel: Tensor
    options: dict[str, Any]
    matrix: Tensor


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def _axes(low: int, high: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(low, high, (count,), generator=generator).tolist())


def entries(shape: tuple[int, ...], family: str, generator: torch.Generator) -> Tensor:
    """Taps: Gaussian, low-pass (positive), small integers, a few large among zeros, filters."""
    if family in STRUCTURED:
        return structured(shape, family, generator)
    values = torch.randn(shape, generator=generator)
    if family == "low-pass":
        return values.abs()
    if family == "integers":
        return torch.randint(-3, 4, shape, generator=generator).float()
    if family == "sparse":
        return values * (torch.rand(shape, generator=generator) < 0.3)
    return values


FAMILIES = ("gaussian", "low-pass", "integers", "sparse")


def _separable(profiles: list[Tensor]) -> Tensor:
    product = torch.ones(())
    for profile in profiles:
        product = product[..., None] * profile
    return product


def _profile(family: str, taps: int, generator: torch.Generator) -> Tensor:
    """Of one axis, symmetric or antisymmetric but for rank one."""
    place = torch.arange(taps) - (taps - 1) / 2
    if family == "blur":
        return torch.exp(-0.5 * (place / (0.2 + taps * torch.rand((), generator=generator))) ** 2)
    if family == "box":
        return torch.ones(taps)
    if family == "difference":  # Haar's for two taps, Sobel's for three
        return place if taps > 1 else torch.ones(1)
    if family == "alternating":
        return (-1.0) ** torch.arange(taps)
    return torch.randn(taps, generator=generator)


def structured(shape: tuple[int, ...], family: str, generator: torch.Generator) -> Tensor:
    """Taps of filters, whose singular vectors are symmetric, antisymmetric, or of few channels.

    A filter in all channels, mixed by ones or by a random matrix, or (decoupled) a wide one in one
    channel and a narrow one in another: the symbol is largest in the wide one's, which loses more
    at the border, so that the norm at the true size may be the other's.
    """
    out, inputs, *taps = shape
    mixing = (
        torch.ones(out, inputs)
        if _integer(0, 2, generator)
        else torch.randn(out, inputs, generator=generator)
    )
    if family == "laplacian":
        kernel = torch.zeros(taps)
        middle = tuple((n - 1) // 2 for n in taps)
        for axis, n in enumerate(taps):
            if n >= 3:
                for side in (-1, 1):
                    at = list(middle)
                    at[axis] += side
                    kernel[tuple(at)] += 1.0
                kernel[middle] -= 2.0
        kernel = kernel if bool(kernel.any()) else torch.ones(taps)
    elif family == "mixed":
        kinds = [SEPARABLE[_integer(0, len(SEPARABLE), generator)] for _ in taps]
        kernel = _separable([_profile(k, n, generator) for k, n in zip(kinds, taps, strict=True)])
    elif family == "decoupled":
        wide = _separable([_profile("blur", n, generator) for n in taps])
        kernel = torch.zeros(shape)
        kernel[0, 0] = wide / wide.sum()
        share = 0.8 + 0.2 * torch.rand((), generator=generator)
        kernel[(-1, -1, *((n - 1) // 2 for n in taps))] = share
        return kernel
    else:
        kernel = _separable([_profile(family, n, generator) for n in taps])
    return mixing.reshape(out, inputs, *[1] * len(taps)) * kernel


SEPARABLE = ("blur", "box", "difference", "alternating", "rank one")
STRUCTURED = (*SEPARABLE, "laplacian", "mixed", "decoupled")


def padding_of(
    mode: str, stride: tuple[int, ...], size: tuple[int, ...], generator: torch.Generator
) -> Any:
    """One of the ways to say it: a number, one per axis, pairs, "same", "valid"."""
    limits = {"circular": 0, "reflect": -1, "zeros": 3, "replicate": 3}
    largest = [
        min(3, n + limits[mode]) if mode in ("circular", "reflect") else limits[mode] for n in size
    ]
    kind = _integer(0, 5, generator)
    if kind == 0 and set(stride) == {1} and mode == "zeros":
        return "same"
    if kind == 1:
        return _integer(0, min(largest) + 1, generator)
    if kind == 2:
        return tuple(_integer(0, n + 1, generator) for n in largest)
    if kind == 3:
        return tuple(
            (_integer(0, n + 1, generator), _integer(0, n + 1, generator)) for n in largest
        )
    return "valid"


def pads_of(
    padding: Any, kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """(left, right) per axis, as torch understands `padding`."""
    count = len(kernel_size)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return [(number // 2, number - number // 2) for number in total]
    if padding == "valid":
        return [(0, 0)] * count
    if isinstance(padding, int):
        return [(padding, padding)] * count
    return [side if isinstance(side, tuple) else (side, side) for side in padding]


def draw(
    generator: torch.Generator,
    largest: int = 220,
    *,
    families: tuple[str, ...] = FAMILIES,
    more: int = 0,
) -> Case:
    """A valid case whose matrix has at most `largest` rows and columns.

    Args:
        families: of the taps, one of which is drawn.
        more: by how much kernels are longer at most than without it, and inputs twice as much.
    """
    while True:
        axes = _integer(1, 4, generator)
        kernel_size = _axes(1, 6 - axes + more, axes, generator)
        size = _axes(1, 9 - 2 * axes + 2 * more, axes, generator)
        stride = _axes(1, 4, axes, generator) if _integer(0, 2, generator) else (1,) * axes
        dilation = _axes(1, 4, axes, generator) if _integer(0, 2, generator) else (1,) * axes
        groups = _integer(1, 4, generator)
        out, inputs = _integer(1, 4, generator), _integer(1, 4, generator)
        family = families[_integer(0, len(families), generator)]
        options = {"stride": stride, "dilation": dilation, "groups": groups, "input_sizes": size}
        if _integer(0, 4, generator) == 0:
            case = _transposed(kernel_size, (inputs, out), options, family, generator)
        else:
            case = _plain(kernel_size, (out, inputs), options, family, generator)
        if case is not None and max(case.matrix.shape) <= largest:
            return case


def _plain(
    kernel_size: tuple[int, ...],
    channels: tuple[int, int],
    options: dict[str, Any],
    family: str,
    generator: torch.Generator,
) -> Case | None:
    out, inputs = channels
    groups, size = options["groups"], options["input_sizes"]
    mode = MODES[_integer(0, len(MODES), generator)]
    padding = padding_of(mode, options["stride"], size, generator)
    pads = pads_of(padding, kernel_size, options["dilation"])
    reach = [d * (k - 1) for d, k in zip(options["dilation"], kernel_size, strict=True)]
    if any(n + sum(pad) <= r for n, pad, r in zip(size, pads, reach, strict=True)):
        return None
    if groups * inputs * math.prod(size) > 400:
        return None
    kernel = entries((out * groups, inputs, *kernel_size), family, generator)
    matrix = conv_matrix(
        kernel,
        size,
        stride=options["stride"],
        padding=pads,
        dilation=options["dilation"],
        groups=groups,
        padding_mode=mode,
    )
    return Case(kernel, {**options, "padding": padding, "padding_mode": mode}, matrix)


def _transposed(
    kernel_size: tuple[int, ...],
    channels: tuple[int, int],
    options: dict[str, Any],
    family: str,
    generator: torch.Generator,
) -> Case | None:
    inputs, out = channels
    groups, size = options["groups"], options["input_sizes"]
    padding = _axes(0, 3, len(size), generator)
    more = tuple(
        _integer(0, max(s, d), generator)
        for s, d in zip(options["stride"], options["dilation"], strict=True)
    )
    image = [
        (n - 1) * s - 2 * p + d * (k - 1) + r + 1
        for n, s, p, d, k, r in zip(
            size, options["stride"], padding, options["dilation"], kernel_size, more, strict=True
        )
    ]
    if min(image) < 1 or out * groups * math.prod(image) > 400:
        return None
    kernel = entries((inputs * groups, out, *kernel_size), family, generator)
    matrix = transposed_conv_matrix(
        kernel,
        size,
        stride=options["stride"],
        padding=padding,
        output_padding=more,
        dilation=options["dilation"],
        groups=groups,
    )
    extra = {"padding": padding, "output_padding": more, "transposed": True}
    return Case(kernel, {**options, **extra}, matrix)


OPTIONS = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
    "transposed": False,
    "output_padding": 0,
    "input_sizes": 1,
}


def together(cases: list[Case]) -> dict[str, list[Any]]:
    """The options of one call with all cases."""
    return {
        name: [case.options.get(name, default) for case in cases]
        for name, default in OPTIONS.items()
    }
