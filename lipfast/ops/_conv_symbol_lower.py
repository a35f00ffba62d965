"""Proved lower bounds of the suprema of symbols, from any frequencies and vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.ops._conv_ascent import Peaks
from lipfast.ops._conv_symbols import PHASE_ERROR, ROOT_OF_TWO, SymbolStack, batches
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma


def image_sizes(stack: SymbolStack, best: Peaks, memory: int) -> tuple[Tensor, Tensor]:
    r"""What `lower_value` is made of, (K, 3), and the directions of $\hat W(\theta)^* x$, (K, m).

    The image is formed by products of entries and their sums, its error bounded entry by entry: the
    three are the sizes of the image, of what bounds its error, and of x.
    """
    sizes, images = [], []
    n, m = stack.sides
    size = 8 * n * m * (len(stack.offsets) + 12)
    for part in batches(len(best.symbols), max(1, memory // size)):
        at = best[part]
        real, imaginary = stack.at(at.symbols, stack.phases(at.centres))
        re, im = (x[:, :, None] for x in (at.vectors.real, at.vectors.imag))
        image = torch.complex(
            (real * re + imaginary * im).sum(1), (real * im - imaginary * re).sum(1)
        )
        magnitudes = stack.taps[at.symbols].abs().sum(1)
        reach = (magnitudes * at.vectors.abs()[:, :, None]).sum(1)
        squares = [_squared_norms(image), reach.square().sum(1), _squared_norms(at.vectors)]
        sizes.append(torch.stack(squares, 1).sqrt())
        images.append(image / sizes[-1][:, :1].clamp_min(1e-300))
    return torch.cat(sizes), torch.cat(images)


def lower_value(shape: Sequence[int], sizes: Sequence[float]) -> float:
    r"""A proved lower value $\|\hat W(\theta)^* x\| / \|x\|$ from one row of `image_sizes`.

    Args:
        shape: of the stack's taps.
        sizes: three numbers.
    """
    image_size, reach_size, size = sizes
    # Where squares may have been denormal, nothing is said.
    if not (image_size > 1e-100 and size > 1e-100):
        return 0.0
    _, count, n, m = shape
    terms = 2 * n + count + 8
    relative = ROOT_OF_TWO * (wide_gamma(terms) + 2 * PHASE_ERROR) * WIDE
    numerator = image_size * (1 - wide_gamma(2 * m + 4)) - relative * reach_size * WIDE
    value = numerator / (size * (1 + wide_gamma(2 * n + 4))) * (1 - 8 * UNIT_ROUNDOFF)
    return max(value, 0.0)


def _squared_norms(x: Tensor) -> Tensor:
    return x.real.square().sum(1) + x.imag.square().sum(1)
