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
from lipfast.ops._conv_symbol_lower import image_sizes, lower_value
from lipfast.ops._conv_symbols import SymbolStack, batches, symbol_stack
from lipfast.ops._keyed import CHOLESKY, UPPER_METHODS
from lipfast.ops.scaling import unscaled_down, unscaled_up
from lipfast.ops.tap_products import tap_differences
from lipfast.rounding import wide_gamma, widened

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
        size = kernels_at_once(taps[first].shape, cells, budget.memory)
        for part in batches(len(indices), size or len(indices)):
            chosen = indices[part]
            near = [start for index in chosen if (start := starts[index]) is not None]
            stack = symbol_stack(
                [taps[index] for index in chosen], cells.periods, with_products=size > 0
            )
            brackets = _brackets_of_one_shape(stack, cells, near, budget)
            found |= zip(chosen, brackets, strict=True)
    return [found[index] for index in range(len(taps))]


def kernels_at_once(shape: Sequence[int], cells: Cells, memory: int) -> int:
    """How many kernels' products of taps fit into half of the memory; 0: none are to be formed.

    On a grid a symbol may cancel, which its square's error would hide.
    """
    groups, *axes, n, _ = shape
    return 0 if cells.on_grid else memory // (16 * groups * len(tap_differences(axes)) * n * n)


def products_fit(shape: Sequence[int], cells: Cells, memory: int) -> bool:
    """Whether a kernel's products, and a symbol beside them, fit into the memory."""
    groups, *axes, n, _ = shape
    held = 8 * groups * len(tap_differences(axes)) * n * n
    return kernels_at_once(shape, cells, memory) > 0 and held + 96 * n * n <= memory


def symbol_fits(n: int, m: int, memory: int) -> bool:
    """Whether a symbol that is formed without products fits into the memory, proof and all."""
    return 96 * n * n + 80 * n * m <= memory


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
    sizes, right = image_sizes(stack, best, budget.memory)
    lower = [lower_value(stack.taps.shape, row) for row in sizes.tolist()]
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
