r"""Symbols of many kernels of one shape, and their Gram matrices, on the device of the taps.

$\hat W(\theta) = \sum_k W_k e^{i k \theta}$. Entries are sums of products in plain float64, formed
by elementwise operations or by lipfast's own kernels: a library's matrix product takes part in
guesses only (docs/bounds.md, "Convolutions on CUDA").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops.fetched import sent
from lipfast.ops.scaling import powers_of_two
from lipfast.ops.small_tops import top_of_small
from lipfast.ops.symbol_grams import Frequencies, symbol_grams
from lipfast.ops.tap_products import tap_differences, tap_products
from lipfast.rounding import UNIT_ROUNDOFF, WIDE, wide_gamma

ROOT_OF_TWO = math.nextafter(math.sqrt(2), 2)
# Of e^{i k theta} as it is computed here: the quotients, their sum, 2 pi, and cosine and sine to
# two units in the last place.
PHASE_ERROR = 64 * UNIT_ROUNDOFF
# Entries of a symbol times taps, up to which all products are formed before they are added.
_AT_ONCE = 1 << 12
_LEAST_EXPONENT, _LARGEST_EXPONENT = -1000, 1022


@dataclass(frozen=True)
class SymbolStack:
    """Symbols of N groups of kernels of one shape.

    Attributes:
        taps: (N, T, n, m), n <= m, float64, each kernel's times a power of two.
        offsets: (T, 3), the taps' places k.
        periods: (3,), denominators of frequencies.
        owners: (N,), which kernel a symbol belongs to.
        exponents: (kernels,), of the powers of two: taps are 2^e times what is here.
        largest: (kernels,), magnitudes of entries as they were given.
        products: `tap_products` of the taps, (N, J, n, n), or None: symbols are formed one by one.
        axes: taps per axis.
        denominators: `periods`, on the host.
    """

    taps: Tensor
    offsets: Tensor
    periods: Tensor
    owners: Tensor
    exponents: Tensor
    largest: Tensor
    products: Tensor | None
    axes: tuple[int, int, int]
    denominators: tuple[int, int, int]

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a symbol."""
        return self.taps.shape[2], self.taps.shape[3]

    def magnitudes(self) -> Tensor:
        """(N, n, m): P = sum_k |W_k|."""
        return self.taps.abs().sum(1)

    def errors(self) -> Tensor:
        r"""(N,): how far a symbol as it is computed is from the true one, in norm.

        Entry by entry $\sqrt 2 (\gamma_{T+1} + \eta) P$, so in norm that times $\|P\|_F$.
        """
        sizes = self.magnitudes().square().sum((1, 2)).sqrt() * WIDE
        relative = ROOT_OF_TWO * (wide_gamma(len(self.offsets) + 1) + PHASE_ERROR) * WIDE
        return sizes * relative + 2.0**-500

    def gram_errors(self) -> Tensor:
        r"""(N,): how far a Gram matrix of the products is from the true one, in norm.

        Entry by entry $\sqrt 2 (\gamma_{m T + 2 J + 2} + \eta) P P^T$, so in norm that times
        $\|P\|_F^2$. Six more roundings are room for one of every diagonal entry.
        """
        count = self.sides[1] * len(self.offsets) + 2 * len(tap_differences(self.axes)) + 8
        relative = ROOT_OF_TWO * (wide_gamma(count) + PHASE_ERROR) * WIDE
        return self.magnitudes().square().sum((1, 2)) * (relative * WIDE) + 2.0**-500

    def shifted_grams(self, symbols: Tensor, centres: Tensor, shifts: Tensor) -> Tensor:
        """Hermitian t I - G (P, n, n) from the products."""
        assert self.products is not None
        at = Frequencies(symbols, centres, self.denominators)
        return symbol_grams(self.products, self.axes, at, shifts)

    def grams(self, symbols: Tensor, centres: Tensor) -> Tensor:
        """Gram matrices (P, n, n) for guesses."""
        if self.products is not None:
            return self.shifted_grams(
                symbols, centres, symbols.new_zeros(len(symbols)).double()
            ).neg_()
        b = torch.complex(*self.at(symbols, self.phases(centres)))
        return torch.bmm(b, b.mH)

    def phases(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (P, T) of k.theta at theta = 2 pi centres / periods."""
        # Integers below 2^63: taps are fewer than 2^22 along an axis.
        steps = (centres[:, None] * self.offsets) % self.periods
        turns = (steps.double() / self.periods.double()).sum(-1)
        angles = (2 * math.pi) * (turns - turns.round())
        return angles.cos(), angles.sin()

    def at(self, symbols: Tensor, phases: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Real and imaginary parts (P, n, m) of the symbols with these numbers."""
        count = len(self.offsets)
        alone = len(self.taps) == 1
        if self.taps[0].numel() <= _AT_ONCE:
            taps = self.taps if alone else self.taps[symbols]
            return tuple(  # type: ignore[return-value]
                (taps * part[:, :, None, None]).sum(1) for part in phases
            )
        parts: list[Tensor] = []
        for k in range(count):
            tap = self.taps[:, k] if alone else self.taps[symbols, k]
            factors = [part[:, k, None, None] for part in phases]
            if k == 0:
                parts = [tap * factor for factor in factors]
            else:
                for part, factor in zip(parts, factors, strict=True):
                    part.addcmul_(tap, factor)
        return parts[0], parts[1]

    def bytes_per_symbol(self) -> int:
        """Of everything that is held for one symbol at once while it is proved."""
        n, m = self.sides
        return 96 * n * n + (80 * n * m if self.products is None else 0)

    def bytes_held(self) -> int:
        """Bytes of the products."""
        return 0 if self.products is None else 8 * self.products.numel()


def symbol_stack(
    taps: Sequence[Tensor] | Tensor, periods: Sequence[int], *, with_products: bool = False
) -> SymbolStack:
    """The symbols of kernels of one shape (groups, 3 axes, n, m), scaled kernel by kernel."""
    if isinstance(taps, Tensor):
        stacked = taps.detach()
    else:
        stacked = torch.stack([tensor.detach() for tensor in taps])
    kernels, groups, *axes, n, m = stacked.shape
    low, high = stacked.reshape(kernels, -1).aminmax(dim=1)
    largest = torch.maximum(-low, high).double()
    exponents = torch.frexp(largest).exponent.clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT)
    scaled = stacked * powers_of_two(-exponents).reshape(-1, *[1] * (stacked.dim() - 1))
    offsets = list(itertools.product(*(range(count) for count in axes)))
    device = stacked.device
    scaled = scaled.reshape(kernels * groups, len(offsets), n, m)
    return SymbolStack(
        scaled,
        sent(offsets, device),
        sent(list(periods), device),
        torch.arange(kernels, device=device)[:, None].expand(-1, groups).reshape(-1),
        exponents,
        largest,
        tap_products(scaled, axes) if with_products else None,
        (axes[0], axes[1], axes[2]),
        (periods[0], periods[1], periods[2]),
    )


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def top_vectors(
    gram: Tensor, start: Tensor, steps: int, squarings: int = 12
) -> tuple[Tensor, Tensor]:
    """Estimates of the largest eigenvalues (P,) and unit eigenvectors (P, n): Lanczos, no proof.

    The basis is orthogonalised twice against all of itself, and the projected matrix is formed
    whole. What is left of a vector in an invariant subspace is set to zero.

    Args:
        gram: (P, n, n), Hermitian.
        start: (P, n), complex, not zero.
        steps: vectors in the basis, at most.
        squarings: of `top_of_small`.
    """
    count, n = start.shape
    steps = min(steps, n)
    basis = torch.zeros(count, n, steps, dtype=gram.dtype, device=gram.device)
    vector = start / start.norm(dim=1, keepdim=True)
    for step in range(steps):
        basis[:, :, step] = vector
        image = torch.bmm(gram, vector[:, :, None])
        known = basis[:, :, : step + 1]
        before = image.norm(dim=1)
        for _ in range(2):
            image = torch.baddbmm(image, known, torch.bmm(known.mH, image), alpha=-1)
        size = image.norm(dim=1)
        alive = size > 1e-13 * before
        vector = torch.where(alive, image[:, :, 0] / size.clamp_min(1e-300), 0)
    projected = torch.bmm(basis.mH, torch.bmm(gram, basis))
    values, vectors = top_of_small(projected, squarings)
    found = torch.bmm(basis, vectors[:, :, None])[:, :, 0]
    size = found.norm(dim=1, keepdim=True)
    # Of a Gram matrix that is zero on the basis the top vector may be beside it.
    found = torch.where(size > 0, found / size.clamp_min(1e-300), basis[:, :, 0])
    return values, found
