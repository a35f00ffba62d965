"""The largest singular value of a convolution at its true size, by Lanczos; proves nothing.

Products are torch's convolutions. For matrices csrc/kernels/cpu/lanczos-inl.h does this, and ends
by the same rule; what is proved of the rule is tested here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipfast.ops._conv_operator import ConvOperator

_BASIS = 64
# Above so many times its tolerance a residual is looked at again after four steps, not two.
_FAR_OFF = 30
# Of a start's random part the first singular vector has 1 / n on average, and less than this part
# of that with a chance of 1 in 40.
_LEAST_SHARE = 1e-3


class Start(NamedTuple):
    """Where Lanczos begins.

    Attributes:
        vector: (C_in, *input_size), float64, not zero.
        random: share of its squared length that is random, with no direction preferred.
    """

    vector: Tensor
    random: float


def top_vector(
    conv: ConvOperator,
    weight: Tensor,
    start: Start,
    *,
    rtol: float,
    enough: float,
    max_passes: int,
    memory: int,
) -> tuple[Tensor, int]:
    r"""A right singular vector of the largest singular value, by Lanczos on A^T A.

    It ends where the Ritz value $\theta$ is an eigenvalue to `rtol` by its residual, and where no
    eigenvalue above $\theta (1 + 2\,\mathrm{rtol})$ can have been missed: the start's share in its
    eigenspace would be less than chance leaves (`unseen_share`). A small residual alone says no
    more than that *some* eigenvalue is near, and a start in a subspace without the first singular
    vector gives the second. A proved upper bound that is reached ends it at once.

    Args:
        conv: A.
        weight: that of A, scaled, float64.
        start: vector, and how much of it is random.
        rtol: on the singular value.
        enough: a value of ||A x||^2 / ||x||^2 that needs no search for a larger one.
        max_passes: products with A^T A.
        memory: bytes that the basis may take.

    Returns:
        The vector, float64, and the number of passes.
    """
    # Single precision leaves about 1e-6 of the value.
    single = conv.weight.dtype == torch.float32 and rtol > 1e-4
    dtype = torch.float32 if single else torch.float64
    nothing = 1e-7 if single else 1e-14
    weight = weight.to(dtype)
    shape, size = start.vector.shape, start.vector.numel()
    limit = max(3, min(_BASIS, size, memory // (size * weight.element_size() + 1)))
    vector, passes = start.vector.reshape(-1).to(dtype), 0
    process = _Process(
        conv, weight, shape, torch.empty(limit, size, dtype=dtype, device=weight.device)
    )
    least = _LEAST_SHARE * start.random / size
    while True:
        process.begin(vector)
        check = 4
        while True:
            process.step()
            passes += 1
            count = process.count
            last = count == limit or passes >= max_passes
            if not (last or process.is_known or count >= check):
                process.extend()
                continue
            diagonal, off = process.coefficients(nothing)
            last = last or len(diagonal) < count or not off[-1] > nothing * diagonal[0]
            count = len(diagonal)
            if last or count < 4 or count >= check:
                value, ritz = top_of_tridiagonal(diagonal, off)
                residual, above = off[-1] * abs(ritz[-1]), value * (1 + 2 * rtol)
                done = value >= enough or (
                    residual <= rtol * value and unseen_share(diagonal, off, above) <= least
                )
                if done or last:
                    break
                check = count + (4 if residual > _FAR_OFF * rtol * value else 2)
            process.extend()
        vector = torch.tensor(ritz, dtype=dtype, device=weight.device) @ process.basis[:count]
        if done or passes >= max_passes or count < limit:
            return vector.double().reshape(shape), passes
        least *= amplified(diagonal, off, ritz, above)


class _Process:
    """Lanczos' process of A^T A. On a device its coefficients stay there until they are looked at.

    Attributes:
        basis: (limit, size), orthonormal rows.
        is_known: whether looking at the coefficients costs nothing.
        count: of coefficients.
    """

    def __init__(
        self, conv: ConvOperator, weight: Tensor, shape: Sequence[int], basis: Tensor
    ) -> None:
        self._conv, self._weight, self._shape = conv, weight, shape
        self.basis, self.is_known = basis, basis.is_cpu
        self._diagonal: list[Any] = []
        self._off: list[Any] = []
        self._image = basis[0]

    @property
    def count(self) -> int:
        return len(self._diagonal)

    def begin(self, vector: Tensor) -> None:
        """Forgets all but a vector."""
        self.basis[0] = vector / vector.norm()
        self._diagonal, self._off = [], []

    def step(self) -> None:
        """One more row of the tridiagonal matrix."""
        known = self.basis[: len(self._diagonal) + 1]
        image = self._conv.forward(known[-1].reshape(1, *self._shape), self._weight)
        image = self._conv.adjoint(image, self._weight).reshape(-1)
        self._diagonal.append(self._number(torch.dot(known[-1], image)))
        image = self._without(image, known[-1], self._diagonal[-1])
        if self._off:
            image = self._without(image, known[-2], self._off[-1])
        self._image = image.addmv_(known.T, torch.mv(known, image), alpha=-1)
        self._off.append(self._number(torch.linalg.vector_norm(self._image)))

    def extend(self) -> None:
        """The next vector of the basis."""
        torch.div(self._image, self._off[-1], out=self.basis[len(self._diagonal)])

    def coefficients(self, nothing: float) -> tuple[list[float], list[float]]:
        """The diagonal and what is beside it, up to where it ends: to `nothing` of the first."""
        if self.is_known:
            return self._diagonal, self._off
        diagonal, off = torch.stack([torch.stack(self._diagonal), torch.stack(self._off)]).tolist()
        ends = [i for i, value in enumerate(off) if not value > nothing * diagonal[0]]
        count = ends[0] + 1 if ends else len(diagonal)
        return diagonal[:count], off[:count]

    def _number(self, value: Tensor) -> Any:
        return float(value) if self.is_known else value

    def _without(self, image: Tensor, vector: Tensor, factor: Any) -> Tensor:
        if self.is_known:
            return image.add_(vector, alpha=-factor)
        return image.addcmul_(vector, factor, value=-1)


def top_of_tridiagonal(
    diagonal: Sequence[float], off: Sequence[float]
) -> tuple[float, list[float]]:
    """Largest eigenvalue and its unit vector; of `off` the last entry leads out of the matrix."""
    matrix = np.diag(diagonal)
    if len(diagonal) > 1:
        matrix += np.diag(off[: len(diagonal) - 1], -1)
    # Reads the lower triangle. Numpy's BLAS has threads of its own, which cost more than it all.
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return float(values[-1]), vectors[:, -1].tolist()


def _polynomials(diagonal: Sequence[float], off: Sequence[float], value: float) -> list[float]:
    r"""Lanczos' orthonormal polynomials $p_0, p_1, \dots$ at a value above their zeros.

    $b_j p_{j+1}(x) = (x - a_j) p_j(x) - b_{j-1} p_{j-1}(x)$; up to the first that is beyond reach.
    """
    found, before, earlier = [1.0], 0.0, 0.0
    for a, b in zip(diagonal, off, strict=True):
        following = (value - a) * found[-1] - earlier * before
        if not following < 1e100 * b:
            return [*found, math.inf]
        before, earlier = found[-1], b
        found.append(following / b)
    return found


def unseen_share(diagonal: Sequence[float], off: Sequence[float], value: float) -> float:
    r"""The largest share of the start's squared length in the eigenspace of `value`.

    $1 / \sum_j p_j(\lambda)^2$ with the orthonormal polynomials of the coefficients that Lanczos
    found (Christoffel's function): no spectral measure with these moments has more at $\lambda$.

    Args:
        diagonal: k coefficients.
        off: k beside them.
        value: above all Ritz values.

    Example:
        >>> unseen_share([1.0], [0.5], 2.0)  # of diag(2, 0.75), at most a fifth
        0.2
    """
    return 1 / sum(p * p for p in _polynomials(diagonal, off, value))


def amplified(
    diagonal: Sequence[float], off: Sequence[float], ritz: Sequence[float], value: float
) -> float:
    """By what the share of an eigenspace of at least `value` grows from the start to a Ritz vector.

    Args:
        diagonal: k coefficients.
        off: k beside them.
        ritz: of the largest Ritz value, in the basis.
        value: above all Ritz values.
    """
    polynomials = _polynomials(diagonal, off, value)
    sign = 1.0 if ritz[0] >= 0 else -1.0
    return sum(sign * r * p for r, p in zip(ritz, polynomials, strict=False)) ** 2
