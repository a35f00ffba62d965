"""A block of samples and bases of Krylov spaces of their Jacobians' squares, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.estimators.jacobian.function import Function
from lipfast.estimators.jacobian.linearization import (
    ADJOINT_TOLERANCE,
    DerivativeError,
    Linearization,
)


def normalized(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths, accumulated in float64, and unit vectors; a zero vector stays zero."""
    length = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64)
    unit = vectors / torch.where(length > 0, length, 1)[:, None]
    return length.to(vectors.dtype), unit.to(vectors.dtype)


class KrylovBlock:
    """Samples, with orthonormal bases of Krylov spaces of J^T J or J J^T, whichever is smaller.

    Args:
        function: (B, D...) -> (B, K).
        x: the samples.
        start: in the smaller of the two spaces, for all of them.
        capacity: vectors that a basis may hold.
        checks: see `SampleFunction`.
    """

    def __init__(
        self,
        function: Function,
        x: Tensor,
        start: Tensor,
        capacity: int,
        checks: list[Tensor] | None = None,
    ) -> None:
        self.function = function
        self.x = x
        self.checks = checks
        self.linear = Linearization(function, x)
        self.samples = torch.arange(len(x), device=x.device)
        capacity = min(len(start), capacity)
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
        """Whether there is no room for another step."""
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
        if self.passes > 0:
            return
        wrong = ((quotient - length).abs() > ADJOINT_TOLERANCE * length).any()
        if self.checks is not None:
            self.checks.append(~wrong)
        elif bool(wrong):
            raise DerivativeError(
                "a custom backward pass has a wrong second derivative: use method='rows'"
            )
