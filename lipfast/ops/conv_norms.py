"""Brackets of the spectral norms of any number of convolutions in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Generic, NamedTuple

import torch
from torch import Tensor

from lipfast.ops._arguments import check_integer, check_rtol
from lipfast.ops._conv_arguments import read_kernels, read_starts, spread
from lipfast.ops._conv_bracket import Budget
from lipfast.ops._conv_brackets import SymbolBracket, lower_at_true_size, symbol_brackets
from lipfast.ops._conv_operator import ConvOperator, conv_operator
from lipfast.ops._conv_search import ConvStart
from lipfast.ops._conv_upper import SymbolProof
from lipfast.ops._keyed import Values, entry_name, keyed, keys_of, listing
from lipfast.ops.denormals import denormals_flushed
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.spectral_norms import DEFAULT_MEMORY

__all__ = ["ConvNorms", "ConvStart", "Supremum", "SymbolProof", "conv_norms"]


class Supremum(NamedTuple, Generic[Values]):
    r"""Bracket of $\sup_\theta \sigma_{\max}(\hat W(\theta))$, keyed like the kernels."""

    lower: Values
    upper: Values


@dataclass(frozen=True, repr=False)
class ConvNorms(Generic[Values]):
    """Brackets of the spectral norms of N convolutions; each field is keyed like the input.

    For a list (or one tensor), `lower`, `upper`, `certified`, `passes`, `cells` and the fields of
    `supremum` are tensors of N values and the others lists of N entries; for a mapping,
    dictionaries with its keys.

    Attributes:
        lower: float64. Of the convolution at the given input size; never above the truth where
            `certified`.
        upper: float64. Never below the truth at the given input size.
        certified: whether both bounds are proved. False where denormals are rounded to zero (see
            `lipfast.ops.denormals`), which the lower bound's proof excludes.
        supremum: lower and upper bound of the symbol's supremum: of the norm over all input sizes
            for zero and circular padding. `upper` may exceed it for other padding, and is below it
            where a finite grid of frequencies is exact.
        right: float64 tensors of unit norm, shaped like an input without the batch dimension:
            where `lower` is attained.
        left: the image's direction (zero if the image is), shaped like an output.
        passes: products with the convolution and its adjoint.
        cells: cells of frequencies whose Gram matrix was factored.
        frequency: where the supremum's lower value is attained, one angle per axis, in radians per
            step of the (polyphase) taps.
        method: how `upper` was proved: "cholesky", "holder" (nothing tighter fits into `memory`:
            loose), each for the symbol, "difference" (the bound of the kernel in `start` and that
            of the difference), or "matrix" for kernels of one tap.
        maximum: what `start` of a later call begins its search with.
        reference: for the same, a `SymbolProof`: the taps that were proved by branch and bound, and
            their bound; a `start` without it (None) begins with vectors only.
    """

    lower: Values
    upper: Values
    certified: Values
    supremum: Supremum[Values]
    right: Any
    left: Any
    passes: Values
    cells: Values
    frequency: Any
    method: Any
    maximum: Any
    reference: Any = None

    def __repr__(self) -> str:
        keys = keys_of(self.lower)

        def line(key: Any) -> str:
            lower, upper, *supremum = (
                f"{values[key].item():.7g}"  # type: ignore[index]
                for values in (self.lower, self.upper, *self.supremum)
            )
            mark = "certified" if self.certified[key] else "estimate "  # type: ignore[index]
            return (
                f"[{lower}, {upper}]  supremum [{', '.join(supremum)}]  {mark}  {self.method[key]}"
            )

        return listing(
            f"ConvNorms of {len(keys)} {'kernel' if len(keys) == 1 else 'kernels'}", keys, line
        )

    def start_of(self, key: Any) -> ConvStart:
        """What a later call may start from at one kernel, by its key."""
        reference = None if self.reference is None else self.reference[key]
        return ConvStart(self.right[key], self.left[key], self.maximum[key], reference)


def conv_norms(
    kernels: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    *,
    input_sizes: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
    padding_mode: Any = "zeros",
    transposed: Any = False,
    output_padding: Any = 0,
    rtol: float = 1e-3,
    start: ConvNorms[Any] | Mapping[str, ConvStart] | None = None,
    seed: int = 0,
    max_passes: int = 300,
    max_cells: int = 100_000,
    memory: int = DEFAULT_MEMORY,
) -> ConvNorms[Any]:
    r"""Lower and upper bounds of $\|x \mapsto W * x\|_2$, the operator as torch applies it.

    Lower: Lanczos with the convolution and its adjoint at the given input size, less rounding.
    Upper: on the infinite grid the norm is $S = \sup_\theta \sigma_{\max}(\hat W(\theta))$,
    $\hat W(\theta) = \sum_k W_k e^{i k \cdot \theta}$ (of the polyphase components for a stride),
    and zero padding is a compression of that. A branch and bound over half of the torus covers it
    by cells; a cell with centre c, angle D = $\sum_a d_a |c_a - \theta_a|$ at most, $d_a$ = (taps -
    1)/2, cannot hold a maximum above $\tau$ once $\sigma_{\max}(\hat W(c)) \le \tau \cos D$ (Duffin
    and Schaeffer, 1938), which a complex Cholesky factorisation proves. Other padding multiplies S
    by the norm of padding (1 for a circulant, the square root of how often an element is read
    otherwise); groups are the maximum over groups; a transposed convolution has the norm of its
    adjoint. On small inputs the norm is visibly below S.

    Every option is one value for all kernels, a tuple with one value per axis, a list with one of
    these per kernel, or, where the kernels are a mapping, a mapping with the same keys.

    Args:
        kernels: weights as torch's modules hold them, (C_out, C_in / groups, \*kernel size) with
            one to three axes, (C_in, C_out / groups, \*kernel size) where `transposed`; float16,
            bfloat16, float32 or float64; a list, a mapping or one tensor.
        input_sizes: of the axes, without batch and channels.
        stride: as torch's.
        padding: numbers, "same", "valid", or uneven: one pair (left, right) per axis.
        dilation: as torch's.
        groups: as torch's.
        padding_mode: "zeros", "circular", "reflect" or "replicate".
        transposed: whether a kernel is that of a transposed convolution.
        output_padding: as torch's, of transposed convolutions.
        rtol: bound on `(upper - lower) / upper` of `supremum`.
        start: what an earlier call with kernels of the same shapes and options returned: begins
            with its vectors and frequencies. Where a kernel has changed by much less than `rtol`,
            its bound is that of the earlier kernel plus one of the difference. Whether a bound is
            proved does not depend on it.
        seed: of start vectors.
        max_passes: limit on Lanczos passes per kernel.
        max_cells: work budget: after so many factored cells the bound is the best that can be
            proved at once.
        memory: bytes for the Gram matrices of one kernel's symbol (without room for them the upper
            bound is Hoelder's, loose), and for one Lanczos basis.

    Returns:
        A `ConvNorms`, keyed like `kernels`.

    Raises:
        ArgumentError: wrong type, dtype, shape or option; the message names the kernel.
        NonFiniteError: a kernel holds NaN or Inf.

    Example:
        >>> import torch, lipfast
        >>> blur = torch.tensor([0.25, 0.5, 0.25]).reshape(1, 1, 3)
        >>> norms = lipfast.conv_norms(blur, input_sizes=16, padding=1)
        >>> print(f"{norms.lower[0]:.3f} {norms.supremum.lower[0]:.3f} {norms.upper[0]:.2f}")
        0.991 1.000 1.00
        >>> strided = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> norms = lipfast.conv_norms(
        ...     {"0.weight": strided.weight}, input_sizes=(32, 32), stride=2, padding=1
        ... )
        >>> bool(norms.lower["0.weight"] <= norms.upper["0.weight"])
        True
    """
    check_rtol(rtol)
    for name, value, least in (
        ("seed", seed, 0),
        ("memory", memory, 0),
        ("max_passes", max_passes, 1),
        ("max_cells", max_cells, 1),
    ):
        check_integer(name, value, least)
    keys, weights = read_kernels(kernels)
    options = {
        "input_size": spread(input_sizes, "input_sizes", kernels, keys),
        "stride": spread(stride, "stride", kernels, keys),
        "padding": spread(padding, "padding", kernels, keys),
        "dilation": spread(dilation, "dilation", kernels, keys),
        "groups": spread(groups, "groups", kernels, keys),
        "padding_mode": spread(padding_mode, "padding_mode", kernels, keys),
        "transposed": spread(transposed, "transposed", kernels, keys),
        "output_padding": spread(output_padding, "output_padding", kernels, keys),
    }
    convs = [
        conv_operator(
            weight,
            entry_name("kernel", key),
            **{name: values[i] for name, values in options.items()},
        )
        for i, (key, weight) in enumerate(zip(keys, weights, strict=True))
    ]
    begin = read_starts(
        _starts_of(start) if isinstance(start, ConvNorms) else start, kernels, keys, convs
    )
    budget = Budget(float(rtol), int(seed), int(max_passes), int(max_cells), int(memory))
    with plain_arithmetic():
        symbols = symbol_brackets(convs, begin, budget)
        flushed = denormals_flushed()
        rows = [
            _row(conv, symbol, first, budget, not flushed)
            for conv, symbol, first in zip(convs, symbols, begin, strict=True)
        ]
    return _collect(rows, keys, as_mapping=isinstance(kernels, Mapping))


def _starts_of(norms: ConvNorms[Any]) -> list[ConvStart] | dict[str, ConvStart]:
    keys = keys_of(norms.maximum)
    starts = [norms.start_of(key) for key in keys]
    return keyed(starts, keys) if isinstance(norms.maximum, dict) else starts


def _row(
    conv: ConvOperator,
    symbol: SymbolBracket,
    begin: ConvStart | None,
    budget: Budget,
    certified: bool,
) -> dict[str, Any]:
    """Every field of the result for one kernel."""
    lower, vector, image, passes = lower_at_true_size(conv, symbol, begin, budget)
    return {
        "lower": lower,
        "upper": symbol.at_true_size,
        "certified": certified,
        "supremum_lower": symbol.lower,
        "supremum_upper": symbol.upper,
        "right": image if conv.transposed else vector,
        "left": vector if conv.transposed else image,
        "passes": passes,
        "cells": symbol.cells,
        "frequency": symbol.maximum.theta,
        "method": symbol.method,
        "maximum": symbol.maximum.start,
        "reference": symbol.reference,
    }


def _collect(rows: list[dict[str, Any]], keys: list[Any], *, as_mapping: bool) -> ConvNorms[Any]:
    device = rows[0]["right"].device
    types = {"certified": torch.bool, "passes": torch.int64, "cells": torch.int64}

    def column(name: str) -> Any:
        values: Any = [row[name] for row in rows]
        if isinstance(values[0], int | float):
            values = torch.tensor(values, dtype=types.get(name, torch.float64), device=device)
        return keyed(values, keys) if as_mapping else values

    names = [field.name for field in fields(ConvNorms) if field.name != "supremum"]
    supremum = Supremum(column("supremum_lower"), column("supremum_upper"))
    return ConvNorms(supremum=supremum, **{name: column(name) for name in names})


@torch.library.register_fake("lipfast::conv_norms")
def _conv_norms_fake(taps: list[Tensor], *_: object) -> tuple[Tensor, ...]:
    count = len(taps)
    real = partial(taps[0].new_empty, dtype=torch.float64)
    whole = [taps[0].new_empty(count, dtype=torch.int64) for _ in range(3)]
    vectors = [real(sum(2 * tensor.shape[side] for tensor in taps)) for side in (4, 5)]
    return (real(count), real(count), real(count, 3), *whole, *vectors)
