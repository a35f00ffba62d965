"""Largest singular values of per-sample Jacobians by Lanczos, without forming any Jacobian.

The operator is J^T J or J J^T, whichever is smaller; one step is a Jacobian-vector and a
vector-Jacobian product of all samples of a block together, so that a layer is a dense matrix
product. Full reorthogonalisation, Rayleigh-Ritz on the whole basis, thick restarts (Wu and Simon,
2000). Samples that have converged leave the block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.jacobian.function import Function, SampleFunction
from lipfast.estimators.jacobian.linearization import (
    ADJOINT_TOLERANCE,
    DerivativeError,
    Footprint,
    Linearization,
)

# Estimated relative error of a norm at which its sample is done.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}
_BASIS, _KEPT = 64, 12
_FIRST_CHECK, _BETWEEN_CHECKS = 12, 4
# What the residual bound may be above the tolerance when the last steps changed nothing.
_CONSERVATIVE = 30
# A larger singular value by this part must not have been missed; what chance leaves of a start in
# any direction is a hundredth of the average at least.
_MISSED, _LEAST_SHARE = 3e-4, 1e-2
# With all errors this many times the tolerance, the next check can wait longer.
_FAR = 100
# A block is rebuilt without its converged samples when at most this part of it is left.
_REBUILD_BELOW = 0.8


class SingularTriplets(NamedTuple):
    """The largest singular value of every Jacobian, and how well it is known.

    Attributes:
        values: (B,): ``||J v||`` for a unit vector v: never above the largest singular value but
            for rounding.
        residuals: (B,): ``||J^T u - value v|| / value``: a singular value lies within that
            relative distance, and the error of the largest is of the order of its square.
        passes: (B,): steps that the sample took.
        left: (B, K), u = J v / ||J v||.
        right: (B, D), v.
    """

    values: Tensor
    residuals: Tensor
    passes: Tensor
    left: Tensor
    right: Tensor


def lanczos_triplets(
    problem: SampleFunction,
    size: Footprint,
    *,
    memory: int,
    max_passes: int = 1000,
) -> SingularTriplets:
    """Largest singular triplet of the Jacobian of every sample.

    Args:
        problem: the function and its samples.
        size: of one sample.
        memory: bytes; decides how many samples make a block. Every sample starts from the same
            seeded vector, so that its value does not depend on its block but for rounding.
        max_passes: of one sample.

    Raises:
        DerivativeError: the function has no Jacobian-vector products.
    """
    side = min(size.inputs, size.outputs)
    basis = min(side, _BASIS)
    vectors = (basis + 4) * side + 4 * max(size.inputs, size.outputs)
    each = 6 * size.saved + 2 * vectors * size.item + 4 * 8 * basis * basis
    blocks = -(-len(problem.x) // max(1, memory // each))
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64, device="cpu").to(problem.x)
    found = []
    for part in torch.tensor_split(problem.x, blocks):
        top, passes = _ritz_vectors(problem.function, part, start, max_passes)
        found.append(_triplets(problem.function, part, top, passes))
    return (
        found[0] if len(found) == 1 else SingularTriplets(*map(torch.cat, zip(*found, strict=True)))
    )


def _triplets(function: Function, x: Tensor, vectors: Tensor, passes: Tensor) -> SingularTriplets:
    """Values and residuals from the final vectors (B, D), or (B, K) if that is the smaller side."""
    linear = Linearization(function, x)
    if linear.inputs <= linear.outputs:
        right, left = vectors, linear.jvp(vectors)
        values, left = _normalized(left)
        back = linear.vjp(left) - values[:, None] * right
    else:
        left, right = vectors, linear.vjp(vectors)
        values, right = _normalized(right)
        back = linear.jvp(right) - values[:, None] * left
    residuals = back.norm(dim=1) / torch.where(values > 0, values, 1)
    return SingularTriplets(values, residuals, passes, left, right)


def _normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths, accumulated in float64, and unit vectors; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    unit = vectors / torch.where(length > 0, length, 1)[:, None]
    return length.to(vectors.dtype), unit.to(vectors.dtype)


class _Block:
    """The samples of a block that have not converged, with their bases."""

    def __init__(self, function: Function, x: Tensor, start: Tensor) -> None:
        self.function = function
        self.x = x
        self.linear = Linearization(function, x)
        self.samples = torch.arange(len(x), device=x.device)
        capacity = min(len(start), _BASIS)
        # basis[:, j]: the vector of step j; one more for the next.
        self.basis = x.new_empty(len(x), capacity + 1, len(start))
        self.basis[:, 0] = start / start.norm()
        self.projected = x.new_zeros(len(x), capacity, capacity, dtype=torch.float64)
        self.next = x.new_zeros(len(x), dtype=torch.float64)
        self.scale = x.new_zeros(len(x), dtype=torch.float64)
        self.top = x.new_zeros(len(x), dtype=torch.float64)
        self.size = 0
        self.kept = 0
        self.passes = 0
        self._turn_start()

    def _turn_start(self) -> None:
        """Signs that depend on the operator: no Jacobian is orthogonal to the seed's vector then.

        x times the signs of A x, entry by entry.
        """
        start = self.basis[:, 0]
        self.basis[:, 0] = torch.where(self._product(start)[0] < 0, -start, start)

    def _product(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """A v / ||J v|| (or J^T in the place of J), and that length."""
        narrow = self.linear.inputs <= self.linear.outputs
        first, second = (
            (self.linear.jvp, self.linear.vjp) if narrow else (self.linear.vjp, self.linear.jvp)
        )
        middle = first(vectors)
        length = torch.linalg.vector_norm(middle, dim=1, dtype=torch.float64)
        shrink = torch.where(length == 0, 0, 1 / length)
        return second(middle * shrink[:, None].to(middle.dtype)), length

    @property
    def full(self) -> bool:
        return self.size == self.projected.shape[1]

    def step(self) -> None:
        """One product with the operator; the result becomes the next vector of the basis.

        The vector between the two products is brought to length 1, so that no square leaves the
        range of the dtype.
        """
        w, length = self._product(self.basis[:, self.size])
        w = w.unsqueeze(1)
        basis = self.basis[:, : self.size + 1]
        # Three terms, but for rounding and right after a restart; then all vectors once more.
        recent = basis if self.size == self.kept else basis[:, -2:]
        first_part = torch.bmm(w, recent.mT)
        w = torch.baddbmm(w, first_part, recent, alpha=-1)
        rest_part = torch.bmm(w, basis.mT)
        w = torch.baddbmm(w, rest_part, basis, alpha=-1).squeeze(1)
        coefficients = rest_part.squeeze(1).double()
        coefficients[:, -recent.shape[1] :] += first_part.squeeze(1)
        self._check_adjoint(coefficients[:, self.size], length)
        coefficients *= length[:, None]
        self.projected[:, : self.size + 1, self.size] = coefficients
        self.projected[:, self.size, : self.size + 1] = coefficients
        rest = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
        self.next = rest * length
        self.scale = torch.maximum(self.scale, length.square())
        # What is left of an invariant subspace is rounding: no further vector there.
        alive = self.next > 100 * torch.finfo(w.dtype).eps * self.scale
        inverse = torch.where(alive, 1 / rest, 0)
        self.next = torch.where(alive | self.next.isnan(), self.next, 0)
        self.size += 1
        self.passes += 1
        self.basis[:, self.size] = w * inverse[:, None].to(w.dtype)

    def _check_adjoint(self, quotient: Tensor, length: Tensor) -> None:
        """<v, J^T J v> / ||J v|| = ||J v||, unless a custom backward pass is wrong."""
        if self.passes == 0 and bool(
            ((quotient - length).abs() > ADJOINT_TOLERANCE * length).any()
        ):
            raise DerivativeError(
                "a custom backward pass has a wrong second derivative: use method='rows'"
            )

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and vectors in the basis; those of broken samples are zero."""
        matrix = self.projected[:, : self.size, : self.size]
        broken = ~torch.isfinite(matrix).all(2).all(1)
        values, vectors = torch.linalg.eigh(torch.where(broken[:, None, None], 0, matrix))
        return values, vectors

    def errors(self, values: Tensor, vectors: Tensor) -> Tensor:
        """Estimated relative errors of the norms; NaN for broken samples.

        The bound residual^2 / gap is far too large where the residual lies in directions of small
        singular values; there the progress since the last look says more, and both must be small.
        """
        top = values[:, -1]
        residual = self.next * vectors[:, -1, -1].abs()
        error = residual
        if self.size > 1:
            gap = top - values[:, -2]
            error = torch.minimum(residual, residual.square() / gap.clamp_min(1e-300))
        broken = ~torch.isfinite(self.projected[:, : self.size, : self.size]).all(2).all(1)
        progress = (top - self.top).abs()
        error = torch.minimum(error, torch.maximum(progress, error / _CONSERVATIVE))
        self.top = top
        relative = torch.where(top > 0, 0.5 * error / top, 0)
        return torch.where(broken | ~torch.isfinite(self.next), torch.nan, relative)

    def unseen(self, values: Tensor, vectors: Tensor) -> Tensor:
        r"""Whether a singular value may be larger by `_MISSED`, and the start hardly holds it.

        The coefficients of an eigenvector of $\lambda$ in the basis are a multiple of $(\lambda -
        T)^{-1} e_k$, k the last, and have at most length 1: the first of them, its share of the
        start, is at most the first entry of that vector of unit length (Christoffel's function).
        After a restart the start is no basis vector, and nothing is said.
        """
        above = values[:, -1:] * (1 + 2 * _MISSED)
        last = vectors[:, -1] / (above - values)
        share = (vectors[:, 0] * last).sum(1).square() / last.square().sum(1)
        return (self.next > 0) & (share > _LEAST_SHARE / self.basis.shape[2]) & (self.kept == 0)

    def assembled(self, vectors: Tensor, chosen: Tensor) -> Tensor:
        """Unit Ritz vectors of the chosen samples in the full space."""
        weights = vectors[chosen, :, -1].to(self.x.dtype).unsqueeze(1)
        return _normalized(torch.bmm(weights, self.basis[chosen, : self.size]).squeeze(1))[1]

    def keep(self, rest: Tensor) -> None:
        """Go on with some of the samples."""
        self.x, self.samples = self.x[rest], self.samples[rest]
        used = self.basis[rest, : self.size + 1]
        self.basis = used.new_empty(len(used), *self.basis.shape[1:])
        self.basis[:, : self.size + 1] = used
        self.projected = self.projected[rest]
        self.next, self.scale, self.top = self.next[rest], self.scale[rest], self.top[rest]
        self.linear = Linearization(self.function, self.x)

    def restart(self, values: Tensor, vectors: Tensor) -> None:
        """Keep the best Ritz vectors and the next vector."""
        kept = min(_KEPT, self.size - 1)
        weights = vectors[:, :, -kept:].to(self.x.dtype)
        following = self.basis[:, self.size].clone()
        self.basis[:, :kept] = torch.bmm(weights.mT, self.basis[:, : self.size])
        self.basis[:, kept] = following
        self.projected.zero_()
        self.projected[:, :kept, :kept] = torch.diag_embed(values[:, -kept:])
        self.size = self.kept = kept


def _ritz_vectors(
    function: Function, x: Tensor, start: Tensor, max_passes: int
) -> tuple[Tensor, Tensor]:
    """Top Ritz vectors (B, side) and passes (B,)."""
    block = _Block(function, x, start)
    result = x.new_zeros(len(x), len(start))
    passes = x.new_zeros(len(x), dtype=torch.int64)
    check, tolerance = _FIRST_CHECK, TOLERANCE[x.dtype]
    finished = x.new_zeros(len(x), dtype=torch.bool)
    while True:
        block.step()
        last = block.passes >= max_passes
        if not (block.full or last or block.passes >= check):
            continue
        values, vectors = block.ritz()
        errors = block.errors(values, vectors)
        far = bool((errors > _FAR * tolerance).all())
        check = block.passes + (2 if far else 1) * _BETWEEN_CHECKS
        # Where all of the space is spanned nothing is missing.
        done = (~(errors > tolerance) & ~block.unseen(values, vectors)) | finished
        done |= block.size == len(start) or last
        new = done & ~finished
        result[block.samples[new]] = block.assembled(vectors, new)
        broken = new & errors.isnan()
        result[block.samples[broken]] = torch.nan
        passes[block.samples[new]] = block.passes
        finished = done
        if bool(finished.all()):
            return result, passes
        if int((~finished).sum()) <= _REBUILD_BELOW * len(finished):
            rest = ~finished
            block.keep(rest)
            values, vectors, finished = values[rest], vectors[rest], finished[rest]
        if block.full:
            block.restart(values, vectors)
