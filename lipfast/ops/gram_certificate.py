"""Upper bounds of many spectral norms through batched factorisations of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lipfast.ops._keyed import CHOLESKY
from lipfast.ops.cholesky_bounds import cholesky_bounds
from lipfast.ops.fetched import sent
from lipfast.ops.shifted_grams import shifted_grams
from lipfast.ops.sides import is_wide, wide
from lipfast.ops.stack import stacked
from lipfast.ops.vectors import Vectors

_ATTEMPTS = 7
# Of a proof and a lower bound from its factor; the vectors that this is found among.
_ROUNDS, _SUBSPACE = 8, 8
# Tensors that one launch of torch's puts together.
_PUT_TOGETHER = 128


_Inspect = Callable[[list[int], Tensor, Tensor, Tensor], None]
"""Sees a batch: indices, scaled matrices, their factors, and where the factorisations failed."""


def prove_upper_bounds(
    matrices: Sequence[Tensor],
    lower: Tensor,
    *,
    excess: float,
    memory: int,
    inspect: _Inspect | None = None,
) -> Tensor:
    r"""Upper bounds of $\|W_i\|_2$ near given lower ones, in batches of matrices of one shape.

    With B = W scaled by a power of two, smaller side first, any t > 0 and **any** matrix L,

    $\lambda_{\max}(B B^T) \le t + \|t I - B B^T - L L^T\|_2$,

    because $L L^T$ is positive semidefinite. L is a Cholesky factor of $t I - B B^T$, from whatever
    library; the residual's Frobenius norm is computed anew in float64 with its rounding accounted
    for (`cholesky_bounds`), so nothing that a library returns enters the proof unchecked. t is
    the lower bound's square times 1 + `excess`: where the factorisation fails, nothing is proved.

    A batch takes three launches and a factorisation, and none of them waits for the device.

    Args:
        matrices: float32 or float64, all on one device.
        lower: (N,), float64, on that device: lower bounds. Of zero and of matrices that are not
            finite nothing is proved.
        excess: of the shifts.
        memory: bytes that one matrix's Gram matrix may take, and a batch's together.
        inspect: is shown every batch.

    Returns:
        (N,), float64: never below the norm, infinite where nothing was proved.
    """
    batches = list(_of_one_shape(matrices, memory))
    order = [index for batch in batches for index in batch]
    if not order:
        return torch.full_like(lower, math.inf)
    places = None
    if order != list(range(len(matrices))):
        places = sent(torch.tensor(order, device="cpu"), lower.device)
        lower = lower.index_select(0, places)
    first, found = 0, []
    for batch in batches:
        part = slice(first, first + len(batch))
        first = part.stop
        w = stacked([wide(matrices[index].detach()) for index in batch])
        grams, scales, shifts = shifted_grams(w, lower[part], excess=excess)
        # Torch's factors are stored by columns: the upper one's transpose is the lower one by rows.
        upper, failures = torch.linalg.cholesky_ex(grams.mT, upper=True)
        found.append(cholesky_bounds(w, upper.mT, failures, scales, shifts))
        if inspect is not None:
            inspect(batch, w.double() * scales[:, None, None], upper.mT, failures)
    values = found[0] if len(found) == 1 else torch.cat(found)
    if places is None:
        return values
    infinite = values.new_full((len(matrices),), math.inf)
    return infinite.index_copy_(0, places, values)


def _of_one_shape(matrices: Sequence[Tensor], memory: int) -> Iterator[list[int]]:
    """Indices of matrices of one shape and type, as many as there is memory for."""
    kinds: dict[tuple[int, int, torch.dtype], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        kinds.setdefault((min(rows, columns), max(rows, columns), matrix.dtype), []).append(index)
    for (side, length, dtype), alike in kinds.items():
        if 8 * side * side > memory:
            continue
        # A Gram matrix, its factor, what a library takes beside, and the matrix where it has to be
        # put beside the others.
        count = max(1, memory // (24 * side * side + dtype.itemsize * side * length))
        for indices in _lying_alike(matrices, alike):
            for first in range(0, len(indices), count):
                yield indices[first : first + count]


def _lying_alike(matrices: Sequence[Tensor], indices: list[int]) -> list[list[int]]:
    """One list, or wide and tall matrices apart where putting them together takes many launches."""
    if len(indices) <= _PUT_TOGETHER:
        return [indices]
    sides = ([i for i in indices if is_wide(*matrices[i].shape) is way] for way in (True, False))
    return [side for side in sides if side]


def _top_vectors(b: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors near the top singular ones: left (n, s) and right (n, l).

    Subspace iteration with (t I - B B^T)^-1. t may be further from the top than the next singular
    values are: a few vectors find it there.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    side = factors.shape[1]
    size = side, min(_SUBSPACE, side)
    start = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(factors)
    basis = start.expand(len(factors), *size)
    for _ in range(4):
        basis = torch.linalg.qr(torch.cholesky_solve(basis, factors))[0]
    projected = basis.mT @ torch.cholesky_solve(basis, factors)
    left = (basis @ torch.linalg.eigh(projected)[1][:, :, -1:])[:, :, 0]
    right = (b.mT @ left[:, :, None])[:, :, 0]
    return left / left.norm(dim=1, keepdim=True), right / right.norm(dim=1, keepdim=True)


@dataclass(frozen=True)
class Brackets:
    """What the native op returns of N matrices, vectors one per matrix.

    `known` holds `lower`, `upper`, `codes` and `passes` where the host knows them: of matrices on a
    device, it has waited for these.
    """

    lower: Tensor
    upper: Tensor
    passes: Tensor
    codes: Tensor
    right: Sequence[Tensor] | Vectors
    left: Sequence[Tensor] | Vectors
    known: Sequence[Sequence[float]] | None = None


LowerBounds = Callable[[list[Tensor], list[Tensor]], Brackets]
"""Lower bounds of matrices from start vectors."""


class _Refinement:
    """Brackets whose first shift failed, as lists: the spectrum is denser than it seemed.

    The factor that is found in the end then gives a start vector for a better lower bound, and that
    a tighter shift.
    """

    def __init__(self, matrices: Sequence[Tensor], found: Brackets, rtol: float, memory: int):
        self._matrices, self._rtol, self._memory = matrices, rtol, memory
        self._found = found
        self._lower, self._upper = found.lower.tolist(), found.upper.tolist()
        self._passes, self._codes = found.passes.tolist(), found.codes.tolist()
        self._right, self._left = list(found.right), list(found.left)

    def run(self, todo: list[int], estimate: LowerBounds) -> Brackets:
        """Proofs and lower bounds in turn, of the matrices `todo`."""
        attempt = 1
        for _ in range(_ROUNDS):
            starts = self._prove(todo, attempt)
            todo = self._improve(starts, estimate) if starts else []
            if not todo:
                break
            attempt = 0
        found = self._found
        return Brackets(
            found.lower.new_tensor(self._lower),
            found.upper.new_tensor(self._upper),
            found.passes.new_tensor(self._passes),
            found.codes.new_tensor(self._codes),
            self._right,
            self._left,
            (self._lower, self._upper, self._codes, self._passes),
        )

    def _prove(self, pending: list[int], attempt: int) -> dict[int, Tensor]:
        """Grows shifts until they prove something; vectors to start from where they had to grow."""
        starts: dict[int, Tensor] = {}
        for power in range(attempt, _ATTEMPTS):
            chosen = pending

            def look(batch: list[int], b: Tensor, factors: Tensor, failures: Tensor) -> None:
                right = (failures == 0).nonzero()[:, 0]
                if power == 0 or not len(right):  # noqa: B023
                    return
                short, long = _top_vectors(b[right], factors[right])
                for place, position in enumerate(right.tolist()):
                    index = chosen[batch[position]]  # noqa: B023
                    as_it_is = is_wide(*self._matrices[index].shape)
                    starts[index] = (long if as_it_is else short)[place]

            values = prove_upper_bounds(
                [self._matrices[index] for index in chosen],
                self._found.lower.new_tensor([self._lower[index] for index in chosen]),
                excess=self._rtol * 16**power,
                memory=self._memory,
                inspect=look,
            ).tolist()
            for index, value in zip(chosen, values, strict=True):
                if value < self._upper[index]:
                    self._upper[index], self._codes[index] = value, CHOLESKY
            pending = [i for i, value in zip(chosen, values, strict=True) if value == math.inf]
            if not pending:
                break
        return starts

    def _improve(self, starts: dict[int, Tensor], estimate: LowerBounds) -> list[int]:
        """Better lower bounds; which matrices have them."""
        better = estimate([self._matrices[index] for index in starts], list(starts.values()))
        improved = []
        values = zip(starts, better.lower.tolist(), better.passes.tolist(), strict=True)
        for position, (index, value, passes) in enumerate(values):
            self._passes[index] += passes
            if value > self._lower[index]:
                self._lower[index] = value
                self._right[index], self._left[index] = (
                    better.right[position],
                    better.left[position],
                )
                improved.append(index)
        return improved


@torch.no_grad()
def _tightened(
    matrices: Sequence[Tensor], found: Brackets, estimate: LowerBounds, rtol: float, memory: int
) -> tuple[Brackets, list[int]]:
    proved = prove_upper_bounds(matrices, found.lower, excess=rtol, memory=memory)
    better = proved < found.upper
    upper = torch.where(better, proved, found.upper)
    codes = torch.where(better, CHOLESKY, found.codes)
    # The one time that the device is waited for, unless a shift was too small.
    fields = (found.lower, upper, codes, found.passes, proved)
    *known, above = torch.stack([field.double() for field in fields]).tolist()
    taken = replace(found, upper=upper, codes=codes, known=known)
    kinds = [int(code) for code in known[2]]
    todo = [
        index
        for index, (code, below, bound) in enumerate(zip(kinds, known[0], above, strict=True))
        if code >= 0 and code != CHOLESKY and below > 0 and bound == math.inf
    ]
    todo = [index for index in todo if 8 * min(matrices[index].shape) ** 2 <= memory]
    if not todo:
        return taken, kinds
    refined = _Refinement(matrices, taken, rtol, memory).run(todo, estimate)
    return refined, refined.codes.tolist()


def tighten(
    matrices: Sequence[Tensor], found: Brackets, estimate: LowerBounds, *, rtol: float, memory: int
) -> tuple[Brackets, list[int]]:
    """Brackets with upper bounds by Cholesky where they can be had, about rtol from the lower ones.

    Also returns their codes, on the host: they come with the one wait for the device. Where a first
    shift fails, the spectrum is denser at the top than Lanczos took it for, and there are more.
    Gradients are those of `found`.
    """
    better, codes = _tightened(matrices, found, estimate, rtol, memory)
    if not found.lower.requires_grad:
        return better, codes
    lower = _WithValue.apply(found.lower, better.lower)  # type: ignore[no-untyped-call]
    upper = _WithValue.apply(found.upper, better.upper)  # type: ignore[no-untyped-call]
    return replace(better, lower=lower, upper=upper), codes


class _WithValue(torch.autograd.Function):
    """Another value, exactly, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None
