"""Largest singular values of Jacobians on a device that nobody waits for, by a fixed schedule.

The steps are those of `lanczos`, as many for every sample. What is known of its largest singular
value in the end is computed from the projected matrix on the device: whether it has converged is
looked at with the results. The second schedule has a basis that is four times as large, instead of
restarts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.jacobian.function import SampleFunction
from lipfast.estimators.jacobian.krylov import KrylovBlock, normalized
from lipfast.estimators.jacobian.lanczos import CONSERVATIVE, LEAST_SHARE, MISSED, TOLERANCE
from lipfast.estimators.jacobian.linearization import Footprint
from lipfast.ops.fetched import sent
from lipfast.ops.small_tops import top_of_small

# Steps of the first schedule: Jacobians of networks take 12 to 32 to the tolerance of float32, and
# 16 to 48 to that of float64. Of the second one, as far as memory holds the vectors of one sample.
_STEPS_AT_FIRST = {torch.float32: 48, torch.float64: 64}
_STEPS_AGAIN = 256
# The value before the last steps; with as many between its looks `lanczos` compares two.
_LAST_STEPS = 4
# Powers of the projected matrix, 2^s, whose top is its own to less than the tolerance.
_SQUARINGS_OF_RITZ = {torch.float32: 24, torch.float64: 48}


class QueuedNorms(NamedTuple):
    """Largest singular values on a device, and whether they are.

    Attributes:
        values: (B,): ``||J v||`` for a unit vector v: never above the largest singular value but
            for rounding. NaN where a Jacobian is not finite.
        open: (B,): whether a value has not converged, or a larger one may have been missed.
    """

    values: Tensor
    open: Tensor


def steps_of(size: Footprint, dtype: torch.dtype, memory: int, *, again: bool) -> int:
    """How many steps the first schedule takes, or the second one."""
    side, first = min(size.inputs, size.outputs), _STEPS_AT_FIRST[dtype]
    fitting = memory // (2 * side * size.item + 1)
    return min(side, max(first, min(_STEPS_AGAIN, fitting)) if again else first)


def bytes_of_steps(size: Footprint, steps: int) -> int:
    """Per sample: its passes, its basis with a copy of some of it, and the small matrices."""
    side = min(size.inputs, size.outputs)
    vectors = (steps + 8) * side + 4 * max(size.inputs, size.outputs)
    # The powers of two matrices, their products, and what is made of them.
    return 6 * size.saved + vectors * size.item + 12 * 8 * steps * steps


def queued_norms(
    problem: SampleFunction, size: Footprint, steps: int, *, memory: int
) -> QueuedNorms:
    """Largest singular value of the Jacobian of every sample, after so many steps.

    Args:
        problem: the function, its samples, and a list of checks.
        size: of one sample.
        steps: by `steps_of`.
        memory: bytes; decides how many samples make a block. What exceeds them alone is done alone.

    Raises:
        DerivativeError: the function has no Jacobian-vector products.
    """
    side = min(size.inputs, size.outputs)
    each = bytes_of_steps(size, steps)
    blocks = -(-len(problem.x) // max(1, memory // each))
    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(side, generator=generator, dtype=torch.float64, device="cpu")
    start = sent(start.to(problem.x.dtype), problem.x.device)
    found = []
    for part in torch.tensor_split(problem.x, blocks):
        block = _QueuedBlock(problem.function, part, start, steps, problem.checks)
        for _ in range(steps):
            block.step()
        found.append(block.found())
    return found[0] if len(found) == 1 else QueuedNorms(*map(torch.cat, zip(*found, strict=True)))


class _QueuedBlock(KrylovBlock):
    """Samples that take a fixed number of steps; nothing is looked at."""

    def found(self) -> QueuedNorms:
        """What the steps have found."""
        values, weights, gap, before = self._ritz()
        vectors = torch.bmm(weights.to(self.x.dtype)[:, None], self.basis[:, : self.size])
        unit = normalized(vectors.squeeze(1))[1]
        narrow = self.linear.inputs <= self.linear.outputs
        norms = normalized(self.linear.jvp(unit) if narrow else self.linear.vjp(unit))[0]
        # NaN is not above anything: nothing more is found there.
        far = self._errors(values, weights, gap, before) > TOLERANCE[norms.dtype]
        whole = self.size == self.basis.shape[2]
        open_ = torch.zeros_like(far) if whole else far | self._unseen(values)
        return QueuedNorms(norms, open_)

    def _ritz(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Top Ritz value, its vector in the basis, its gap, and the value before the last steps."""
        matrix, squarings = self.projected, _SQUARINGS_OF_RITZ[self.x.dtype]
        earlier = matrix.clone()
        last = max(1, self.size - _LAST_STEPS)
        earlier[:, last:] = 0
        earlier[:, :, last:] = 0
        both, vectors = top_of_small(torch.cat([matrix, earlier]), squarings)
        top, weights = both[: len(matrix)], vectors[: len(matrix)]
        rest = matrix - top[:, None, None] * weights[:, :, None] * weights[:, None]
        following, _ = top_of_small(rest, squarings)
        return top, weights, top - following, both[len(matrix) :]

    def _errors(self, top: Tensor, weights: Tensor, gap: Tensor, before: Tensor) -> Tensor:
        """Estimated relative errors of the norms, as `lanczos` has them."""
        residual = self.next * weights[:, -1].abs()
        error = torch.minimum(residual, residual.square() / gap.clamp_min(1e-300))
        progress = (top - before).abs()
        error = torch.minimum(error, torch.maximum(progress, error / CONSERVATIVE))
        return torch.where(top > 0, 0.5 * error / top, 0)

    def _unseen(self, top: Tensor) -> Tensor:
        r"""Whether a singular value may be larger by `MISSED`, and the start hardly holds it.

        The share of the start is that of `lanczos`: the first entry of $(\lambda - T)^{-1} e_k$ of
        unit length, by the factor $\lambda - T = U^T U$, as $U^{-T} e_k$ is a multiple of $e_k$.
        """
        shifted = -self.projected
        shifted.diagonal(dim1=1, dim2=2).add_((top * (1 + 2 * MISSED))[:, None])
        upper, _ = torch.linalg.cholesky_ex(shifted, upper=True)
        unit = torch.zeros_like(shifted[:, :, :1])
        unit[:, -1] = 1
        column = torch.linalg.solve_triangular(upper, unit, upper=True).squeeze(2)
        share = column[:, 0].square() / column.square().sum(1)
        unseen: Tensor = (self.next > 0) & (share > LEAST_SHARE / self.basis.shape[2])
        return unseen
