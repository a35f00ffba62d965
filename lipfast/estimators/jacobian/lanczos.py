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
from lipfast.estimators.jacobian.krylov import KrylovBlock, normalized
from lipfast.estimators.jacobian.linearization import Footprint, Linearization

# Estimated relative error of a norm at which its sample is done.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-14}
_BASIS, _KEPT = 64, 12
_FIRST_CHECK, _BETWEEN_CHECKS = 12, 4
# What the residual bound may be above the tolerance when the last steps changed nothing.
CONSERVATIVE = 30
# A larger singular value by this part must not have been missed; what chance leaves of a start in
# any direction is a hundredth of the average at least.
MISSED, LEAST_SHARE = 3e-4, 1e-2
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
        values, left = normalized(left)
        back = linear.vjp(left) - values[:, None] * right
    else:
        left, right = vectors, linear.vjp(vectors)
        values, right = normalized(right)
        back = linear.jvp(right) - values[:, None] * left
    residuals = back.norm(dim=1) / torch.where(values > 0, values, 1)
    return SingularTriplets(values, residuals, passes, left, right)


class _Block(KrylovBlock):
    """The samples of a block that have not converged, looked at every few steps."""

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
        error = torch.minimum(error, torch.maximum(progress, error / CONSERVATIVE))
        self.top = top
        relative = torch.where(top > 0, 0.5 * error / top, 0)
        return torch.where(broken | ~torch.isfinite(self.next), torch.nan, relative)

    def unseen(self, values: Tensor, vectors: Tensor) -> Tensor:
        r"""Whether a singular value may be larger by `MISSED`, and the start hardly holds it.

        The coefficients of an eigenvector of $\lambda$ in the basis are a multiple of $(\lambda -
        T)^{-1} e_k$, k the last, and have at most length 1: the first of them, its share of the
        start, is at most the first entry of that vector of unit length (Christoffel's function).
        After a restart the start is no basis vector, and nothing is said.
        """
        above = values[:, -1:] * (1 + 2 * MISSED)
        last = vectors[:, -1] / (above - values)
        share = (vectors[:, 0] * last).sum(1).square() / last.square().sum(1)
        return (self.next > 0) & (share > LEAST_SHARE / self.basis.shape[2]) & (self.kept == 0)

    def assembled(self, vectors: Tensor, chosen: Tensor) -> Tensor:
        """Unit Ritz vectors of the chosen samples in the full space."""
        weights = vectors[chosen, :, -1].to(self.x.dtype).unsqueeze(1)
        return normalized(torch.bmm(weights, self.basis[chosen, : self.size]).squeeze(1))[1]

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
    block = _Block(function, x, start, _BASIS)
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
