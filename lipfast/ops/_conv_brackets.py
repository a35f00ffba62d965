"""Brackets of many convolutions in one call: which kernels go which way, and all of it together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._conv_bracket import Budget
from lipfast.ops._conv_lanczos import top_vector
from lipfast.ops._conv_lower import certified_lower
from lipfast.ops._conv_operator import ConvOperator
from lipfast.ops._conv_search import (
    ConvStart,
    SymbolMaximum,
    first_vector,
    symbol_maximum,
)
from lipfast.ops._conv_upper import (
    SymbolProof,
    bound_at_true_size,
    bound_nearby,
    bounds_side_by_side,
    coarse_bounds,
    native_brackets,
    proof_of,
)
from lipfast.ops.scaling import scaled, unscaled_down
from lipfast.ops.spectral_norms import SpectralNorms, spectral_norms


@dataclass
class SymbolBracket:
    """The bracket of a symbol's supremum, and what it says of the operator.

    Attributes:
        lower: at `maximum`.
        upper: proved.
        cells: of frequencies that were factored.
        method: how `upper` was proved.
        maximum: where the norm is largest, as far as was found.
        reference: taps that `upper` was proved of, or the ones nearby that it rests on.
        at_true_size: bound of the operator's norm.
    """

    lower: float
    upper: float
    cells: int
    method: str
    maximum: SymbolMaximum
    reference: SymbolProof | None = None
    at_true_size: float = math.inf


def symbol_brackets(
    convs: Sequence[ConvOperator], begin: Sequence[ConvStart | None], budget: Budget
) -> list[SymbolBracket]:
    """By kernels nearby, then those of several taps in one native call, the others as matrices."""
    taps = [conv.taps() for conv in convs]
    found = _nearby(convs, taps, begin, budget)
    single = [tensor.shape[1:4].numel() == 1 for tensor in taps]
    several = [i for i, alone in enumerate(single) if not alone and i not in found]
    for i, bracket in _searched(several, convs, taps, begin, budget).items():
        bracket.reference = proof_of(taps[i], convs[i].weight, bracket.upper)
        found[i] = bracket
    found |= _of_matrices([i for i, alone in enumerate(single) if alone], convs, taps, budget)
    for i, conv in enumerate(convs):
        found[i].at_true_size = bound_at_true_size(found[i].upper, conv, budget)
    return [found[i] for i in range(len(convs))]


def _searched(
    chosen: Sequence[int],
    convs: Sequence[ConvOperator],
    taps: Sequence[Tensor],
    begin: Sequence[ConvStart | None],
    budget: Budget,
) -> dict[int, SymbolBracket]:
    """The native op's brackets of some of the kernels."""
    starts = [None if (known := begin[i]) is None else known.maximum for i in chosen]
    found = native_brackets([taps[i] for i in chosen], budget, starts)
    return {
        i: SymbolBracket(
            one.lower,
            one.upper,
            one.cells,
            one.method,
            symbol_maximum(convs[i], one.group, one.frequency, one.left, one.right),
        )
        for i, one in zip(chosen, found, strict=True)
    }


_BoundChanges = Callable[[Sequence[Tensor], Budget], list[tuple[float, int]]]
# The cheap one first: it may be loose.
_WAYS: tuple[_BoundChanges, ...] = (bounds_side_by_side, coarse_bounds)


def _nearby(
    convs: Sequence[ConvOperator],
    taps: Sequence[Tensor],
    begin: Sequence[ConvStart | None],
    budget: Budget,
) -> dict[int, SymbolBracket]:
    """Brackets by earlier kernels, of those that are not too loose.

    The lower value is that at the earlier kernel's frequency.
    """
    differences: dict[int, Tensor] = {}
    bounds: dict[int, float] = {}
    for i, (tensor, known) in enumerate(zip(taps, begin, strict=True)):
        reference = None if known is None else known.reference
        proved = None if reference is None else reference.bound_of(tensor.shape)
        if proved is None:
            continue
        difference = tensor.double() - proved[0].double()
        # The root mean square over the frequencies: the supremum is above it.
        mean = float(difference.norm()) / math.sqrt(tensor.shape[0] * tensor.shape[4])
        if mean <= budget.rtol * proved[1]:
            differences[i], bounds[i] = difference, proved[1]
    near = _searched(list(differences), convs, taps, begin, budget._replace(max_cells=0))
    found: dict[int, SymbolBracket] = {}
    for bound_changes in _WAYS:
        chosen = [i for i in differences if i not in found]
        changes = bound_changes([differences[i] for i in chosen], budget)
        for i, (change, cells) in zip(chosen, changes, strict=True):
            upper, bracket, known = bound_nearby(bounds[i], change), near[i], begin[i]
            if math.isfinite(upper) and upper - bracket.lower <= budget.rtol * upper:
                bracket.upper, bracket.cells, bracket.method = upper, cells, "difference"
                bracket.reference = None if known is None else known.reference
                found[i] = bracket
    return found


def _of_matrices(
    chosen: Sequence[int],
    convs: Sequence[ConvOperator],
    taps: Sequence[Tensor],
    budget: Budget,
) -> dict[int, SymbolBracket]:
    """Kernels of one tap: the norm of a matrix, the largest of the groups'."""
    if not chosen:
        return {}
    norms: SpectralNorms[Any] = spectral_norms(
        [matrix for i in chosen for matrix in taps[i][:, 0, 0, 0]],
        rtol=budget.rtol,
        seed=budget.seed,
        memory=budget.memory,
    )
    found, first = {}, 0
    nowhere = torch.zeros(3, dtype=torch.float64, device=norms.lower.device)
    for i in chosen:
        part = slice(first, first + len(taps[i]))
        group = int(norms.lower[part].argmax())
        left, right = (
            torch.cat([vectors[first + group], torch.zeros_like(vectors[first + group])])
            for vectors in (norms.left, norms.right)
        )
        found[i] = SymbolBracket(
            float(norms.lower[part].max()),
            float(norms.upper[part].max()),
            0,
            "holder" if "holder" in norms.method[part] else "matrix",
            symbol_maximum(convs[i], group, nowhere, left, right),
        )
        first = part.stop
    return found


def lower_at_true_size(
    conv: ConvOperator, symbol: SymbolBracket, begin: ConvStart | None, budget: Budget
) -> tuple[float, Tensor, Tensor, int]:
    """Proved lower bound, its unit right vector, the image's direction, and the passes."""
    weights, exponents = scaled(conv.weight[None])
    enough = unscaled_down(symbol.at_true_size * (1 - 0.5 * budget.rtol), -exponents[0])
    vector, passes = top_vector(
        conv,
        weights[0],
        first_vector(conv, symbol.maximum, begin, budget.seed),
        rtol=budget.rtol,
        enough=enough * enough,
        max_passes=budget.max_passes,
        memory=budget.memory,
    )
    lower, image = certified_lower(conv, weights[0], exponents[0], vector, budget.memory)
    return lower, vector / vector.norm(), image, passes
