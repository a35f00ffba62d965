r"""Symbols of many kernels of one shape, and what is proved of them, in torch.

$\hat W(\theta) = \sum_k W_k e^{i k \theta}$. All of it on the device of the taps. Entries are sums
of products in plain float64, formed by elementwise operations: a library's matrix product takes
part in guesses only (docs/bounds.md, "Convolutions on CUDA").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.ops.cholesky_bounds import cholesky_bounds
from lipfast.ops.scaling import powers_of_two
from lipfast.ops.shifted_grams import LEAST_SHIFT
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
    """

    taps: Tensor
    offsets: Tensor
    periods: Tensor
    owners: Tensor
    exponents: Tensor
    largest: Tensor

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
        return 80 * n * m + 112 * n * n


def symbol_stack(taps: Sequence[Tensor], periods: Sequence[int]) -> SymbolStack:
    """The symbols of kernels of one shape (groups, 3 axes, n, m), scaled kernel by kernel."""
    stacked = torch.stack([tensor.detach() for tensor in taps])
    kernels, groups, *axes, n, m = stacked.shape
    low, high = stacked.reshape(kernels, -1).aminmax(dim=1)
    largest = torch.maximum(-low, high).double()
    exponents = torch.frexp(largest).exponent.clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT)
    scaled = stacked * powers_of_two(-exponents).reshape(-1, *[1] * (stacked.dim() - 1))
    offsets = list(itertools.product(*(range(count) for count in axes)))
    device = stacked.device
    return SymbolStack(
        scaled.reshape(kernels * groups, len(offsets), n, m),
        torch.tensor(offsets, device=device),
        torch.tensor(periods, device=device),
        torch.arange(kernels, device=device).repeat_interleave(groups),
        exponents,
        largest,
    )


def prove(real: Tensor, imaginary: Tensor, gram: Tensor, targets: Tensor) -> Tensor:
    r"""Proved upper bounds of $\|B_i\|_2$, infinite where unproved.

    From a complex Cholesky factor L of t I - B B^* by any library. With every complex number
    a + i b written as ((a, -b), (b, a)) the singular values of B and the eigenvalues of
    R = t I - B B^* - L L^* are the same, each twice, and L stays lower triangular as its diagonal
    is real: the proof is that of real matrices.

    Args:
        real: parts of the matrices B (P, n, m).
        imaginary: alike.
        gram: B B^*, complex, as a library has it.
        targets: (P,): what is to be proved. t is a little below its square.
    """
    n, m = real.shape[1:]
    # Below by what the residual of an exact factor is bounded by; a shift proves what it proves.
    slack = 8 * n * wide_gamma(2 * (n + m) + 1)
    shifts = (targets.square() * (1 - slack)).clamp_min(LEAST_SHIFT)
    shifted = gram.neg()
    shifted.diagonal(dim1=1, dim2=2).add_(shifts[:, None])
    upper, failures = torch.linalg.cholesky_ex(shifted, upper=True)
    good = (failures == 0).nonzero()[:, 0]
    bounds = torch.full_like(targets, math.inf)
    if not len(good):
        return bounds
    # L is the conjugate of this.
    conjugate, real, imaginary = upper[good].mT, real[good], imaginary[good]
    pairs = torch.stack([real, -imaginary, imaginary, real], 2)
    b = pairs.reshape(len(good), 2 * n, 2 * m)
    parts = conjugate.real, conjugate.imag
    quads = torch.stack([parts[0], parts[1], -parts[1], parts[0]], -1)
    quads = quads.reshape(len(good), n, n, 2, 2).transpose(2, 3)
    factors = quads.reshape(len(good), 2 * n, 2 * n)
    ones = torch.ones_like(shifts[good])
    found = cholesky_bounds(b, factors, failures[good], ones, shifts[good])
    return bounds.index_copy(0, good, found)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `count`."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def top_vectors(gram: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Estimates of the largest eigenvalues (P,) and unit eigenvectors (P, n): Lanczos, no proof.

    The basis is orthogonalised twice against all of itself, and the projected matrix is formed
    whole. What is left of a vector in an invariant subspace is set to zero.

    Args:
        gram: (P, n, n), Hermitian.
        start: (P, n), complex, not zero.
        steps: vectors in the basis, at most.
    """
    count, n = start.shape
    steps = min(steps, n)
    basis = torch.zeros(count, n, steps, dtype=gram.dtype, device=gram.device)
    images = torch.zeros_like(basis)
    vector = start / start.norm(dim=1, keepdim=True)
    for step in range(steps):
        basis[:, :, step] = vector
        image = torch.bmm(gram, vector[:, :, None])
        images[:, :, step] = image[:, :, 0]
        known = basis[:, :, : step + 1]
        before = image.norm(dim=1)
        for _ in range(2):
            image = image - torch.bmm(known, torch.bmm(known.mH, image))
        size = image.norm(dim=1)
        alive = size > 1e-13 * before
        vector = torch.where(alive, image[:, :, 0] / size.clamp_min(1e-300), 0)
    projected = torch.bmm(basis.mH, images)
    values, vectors = torch.linalg.eigh(0.5 * (projected + projected.mH))
    found = torch.bmm(basis, vectors[:, :, -1:])[:, :, 0]
    size = found.norm(dim=1, keepdim=True)
    # Of a Gram matrix that is zero on the basis the top vector may be beside it.
    found = torch.where(size > 0, found / size.clamp_min(1e-300), basis[:, :, 0])
    return values[:, -1], found
