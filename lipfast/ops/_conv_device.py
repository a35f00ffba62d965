"""Brackets of the suprema of symbols, on the device of their taps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.ops._conv_ascent import Peaks, start_vectors
from lipfast.ops._conv_bracket import Budget, NativeBracket
from lipfast.ops._conv_cells import Cells, cells_of
from lipfast.ops._conv_cover import Cover
from lipfast.ops._conv_symbols import (
    PHASE_ERROR,
    ROOT_OF_TWO,
    SymbolStack,
    batches,
    symbol_stack,
)
from lipfast.ops._keyed import CHOLESKY, UPPER_METHODS
from lipfast.ops.scaling import unscaled_down, unscaled_up
from lipfast.ops.tap_products import tap_differences
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma, widened

# Numbers in front of a start's vector: group, frequency on three axes.
_HEADER = 4


def device_brackets(
    taps: Sequence[Tensor],
    budget: Budget,
    starts: Sequence[Tensor | None],
    grid: Sequence[int],
) -> list[NativeBracket]:
    """Brackets of S, or of the maximum over a grid: kernels of one shape together.

    Args:
        taps: finite, (groups, 3 axes, rows, cols), rows <= cols, axes with one tap last.
        budget: what may be spent.
        starts: per kernel, `ConvStart.maximum` of a kernel nearby, or None.
        grid: three sizes per kernel; zeros: all frequencies.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, tensor in enumerate(taps):
        points = tuple(grid[3 * index : 3 * index + 3])
        kind = (tuple(tensor.shape), tensor.dtype, points, starts[index] is None)
        kinds.setdefault(kind, []).append(index)
    found: dict[int, NativeBracket] = {}
    for indices in kinds.values():
        first = indices[0]
        cells = cells_of(taps[first].shape[1:4], grid[3 * first : 3 * first + 3])
        size = _kernels_at_once(taps[first].shape, cells, budget.memory)
        for part in batches(len(indices), size or len(indices)):
            chosen = indices[part]
            near = [start for index in chosen if (start := starts[index]) is not None]
            stack = symbol_stack(
                [taps[index] for index in chosen], cells.periods, with_products=size > 0
            )
            brackets = _brackets_of_one_shape(stack, cells, near, budget)
            found |= zip(chosen, brackets, strict=True)
    return [found[index] for index in range(len(taps))]


def _kernels_at_once(shape: Sequence[int], cells: Cells, memory: int) -> int:
    """How many kernels' products of taps fit into half of the memory; 0: none are to be formed.

    On a grid a symbol may cancel, which its square's error would hide.
    """
    groups, *axes, n, _ = shape
    return 0 if cells.on_grid else memory // (16 * groups * len(tap_differences(axes)) * n * n)


def _brackets_of_one_shape(
    stack: SymbolStack, cells: Cells, starts: list[Tensor], budget: Budget
) -> list[NativeBracket]:
    kernels = len(stack.exponents)
    groups = len(stack.taps) // kernels
    known = _peaks_nearby(stack, starts, groups, budget) if starts else None
    holder = stack.bytes_held() + stack.bytes_per_symbol() > budget.memory
    if holder or (budget.max_cells == 0 and known is not None):
        upper = _holder(stack) if holder and budget.max_cells > 0 else [math.inf] * kernels
        tested = [0] * kernels
        best = known or _somewhere(stack, groups, budget)
    else:
        cover = Cover(stack, cells, budget, known)
        if budget.max_cells > 0:
            cover.run()
        best, tested = cover.best, cover.tested
        upper = cover.tau if budget.max_cells > 0 else [math.inf] * kernels
    method = UPPER_METHODS[-1] if holder else UPPER_METHODS[CHOLESKY]
    lower, right = _lower(stack, best, budget.memory)
    scales = zip(stack.exponents.tolist(), stack.largest.tolist(), strict=True)
    frequencies, symbols = best.centres / stack.periods.double(), best.symbols.tolist()
    return [
        NativeBracket(
            # The largest tap entry is a lower bound without rounding: it is a mean of symbols.
            max(unscaled_down(lower[i], exponent), 0.0 if cells.on_grid else largest),
            unscaled_up(upper[i], exponent) if largest > 0 else 0.0,
            frequencies[i],
            symbols[i] - i * groups,
            tested[i] if largest > 0 else 0,
            method,
            _as_real(best.vectors[i]),
            _as_real(right[i]),
        )
        for i, (exponent, largest) in enumerate(scales)
    ]


def _as_real(vector: Tensor) -> Tensor:
    return torch.cat([vector.real, vector.imag])


def _peaks_nearby(stack: SymbolStack, starts: list[Tensor], groups: int, budget: Budget) -> Peaks:
    """Where kernels nearby have their maxima, with a little noise that leads out of subspaces."""
    given = torch.stack(starts)
    n = stack.sides[0]
    centres = (given[:, 1:_HEADER] * stack.periods).round().long() % stack.periods
    vectors = torch.complex(given[:, _HEADER : _HEADER + n], given[:, _HEADER + n :])
    noise = start_vectors(len(starts), n, budget.seed, given)
    vectors = vectors + 1e-4 * noise / noise.norm(dim=1, keepdim=True)
    first = groups * torch.arange(len(starts), device=given.device)
    return Peaks(vectors.new_zeros(len(starts)).real, given[:, 0].long() + first, centres, vectors)


def _somewhere(stack: SymbolStack, groups: int, budget: Budget) -> Peaks:
    """The frequency zero of the groups with the largest magnitudes."""
    kernels = len(stack.exponents)
    sizes = stack.magnitudes().square().sum((1, 2)).reshape(kernels, groups)
    symbols = sizes.argmax(1) + groups * torch.arange(kernels, device=sizes.device)
    vectors = start_vectors(kernels, stack.sides[0], budget.seed, sizes)
    centres = torch.zeros(kernels, 3, dtype=torch.long, device=sizes.device)
    return Peaks(sizes.new_zeros(kernels), symbols, centres, vectors)


def _holder(stack: SymbolStack) -> list[float]:
    """min(sqrt(||P||_1 ||P||_inf), ||P||_F) >= S, P = sum_k |W_k|, the largest of the groups."""
    magnitudes = stack.magnitudes()
    n, m = stack.sides
    sums = magnitudes.sum(1).amax(1) * magnitudes.sum(2).amax(1)
    squares = torch.minimum(sums, magnitudes.square().sum((1, 2)))
    terms = n * m + 2 * len(stack.offsets) + 8
    roots = (squares * (1 + wide_gamma(terms)) + 2.0**-900).sqrt()
    largest = roots.new_zeros(len(stack.exponents)).scatter_reduce(0, stack.owners, roots, "amax")
    return [widened(value, 4) for value in largest.tolist()]


def _lower(stack: SymbolStack, best: Peaks, memory: int) -> tuple[list[float], Tensor]:
    r"""Proved lower values $\|\hat W(\theta)^* x\| / \|x\|$, and the images' directions (K, m).

    The image is formed by products of entries and their sums, its error bounded entry by entry.
    """
    values, images = [], []
    n, m = stack.sides
    terms = 2 * n + len(stack.offsets) + 8
    relative = ROOT_OF_TWO * (wide_gamma(terms) + 2 * PHASE_ERROR) * WIDE
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
        values.append(torch.stack(squares, 1).sqrt())
        images.append(image / values[-1][:, :1].clamp_min(1e-300))
    found = []
    for image_size, reach_size, size in torch.cat(values).tolist():
        # Where squares may have been denormal, nothing is said.
        if not (image_size > 1e-100 and size > 1e-100):
            found.append(0.0)
            continue
        numerator = image_size * (1 - wide_gamma(2 * m + 4)) - relative * reach_size * WIDE
        value = numerator / (size * (1 + wide_gamma(2 * n + 4))) * (1 - 8 * UNIT_ROUNDOFF)
        found.append(max(value, 0.0))
    return found, torch.cat(images)


def _squared_norms(x: Tensor) -> Tensor:
    return x.real.square().sum(1) + x.imag.square().sum(1)
