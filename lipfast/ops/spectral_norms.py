"""Brackets of the norms of any number of matrices in one call."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.ops._arguments import Norm, check_floating, check_norm, native_dtype
from lipfast.ops.denormals import denormals_flushed

DEFAULT_MEMORY = 2 << 30
_UPPER_METHODS = ("none", "cholesky", "holder")
_METHODS = ("lanczos", "power")

_Values = TypeVar("_Values")


@dataclass(frozen=True, repr=False)
class SpectralNorms(Generic[_Values]):
    """Brackets of the norms of N matrices; each field is keyed like the input.

    For a list (or one tensor), `lower`, `upper`, `certified` and `passes` are tensors of N values
    and `right`, `left`, `method` lists of N entries; for a mapping, dictionaries with its keys.

    Attributes:
        lower: float64. Never above the truth (proved, rounding included).
        upper: float64. Never below the truth where `certified`; `inf` where no bound was asked for.
        certified: whether `upper` is a proved bound (norm 1 and inf: not while denormals are
            rounded to zero, see `lipfast.ops.denormals`).
        right: float64 vectors of unit norm (cols): where `lower` is attained; for norm 1 and inf
            the vector whose image is the largest.
        left: float64 vectors of unit norm (rows): its image's direction.
        passes: products with the matrix (or its Gram matrix) that the estimate took.
        method: how `upper` was proved: "cholesky", "holder" (happened to be smaller, or there was
            no memory for the Gram matrix: loose then), "sums" (norm 1 and inf) or "none".
    """

    lower: _Values
    upper: _Values
    certified: _Values
    right: Any
    left: Any
    passes: _Values
    method: Any

    def __repr__(self) -> str:
        keyed = isinstance(self.lower, dict)
        keys = (
            list(cast("dict[str, Tensor]", self.lower))
            if keyed
            else range(len(cast(Tensor, self.lower)))
        )
        lines = [f"SpectralNorms of {len(keys)} matrices"]
        shown = list(keys)[:20]
        width = max((len(str(key)) for key in shown), default=0)
        for key in shown:
            mark = "certified" if self.certified[key] else "estimate "  # type: ignore[index]
            lines.append(
                f"  {key!s:<{width}}  [{float(self.lower[key]):.9g}, {float(self.upper[key]):.9g}]"  # type: ignore[index]
                f"  {mark}  {self.method[key]}"
            )
        if len(keys) > len(shown):
            lines.append(f"  ... and {len(keys) - len(shown)} more")
        return "\n".join(lines)


def spectral_norms(
    tensors: Sequence[Tensor] | Mapping[str, Tensor] | Tensor,
    *,
    norm: Norm = 2,
    rtol: float = 1e-6,
    certify: bool = True,
    method: str = "lanczos",
    start: Sequence[Tensor | None] | Mapping[str, Tensor] | None = None,
    seed: int = 0,
    max_passes: int = 300,
    memory: int = DEFAULT_MEMORY,
) -> SpectralNorms[Any]:
    r"""Lower and upper bounds of the operator norms $\|W_i\|_p$ of matrices of any shapes.

    For p = 2, the largest singular value. Lower: $\|W v\|_2 / \|v\|_2$ at the last Lanczos vector
    (with full reorthogonalisation), in float64 and less its own rounding. Upper: $\sqrt{t +
    \epsilon}$ for a shift t at which $t I - W W^T$ has a Cholesky factor and $\epsilon$ covers
    every rounding (Demmel 1989; Rump, BIT 46, 2006). For p = 1 and inf, the largest column and row
    sum of magnitudes, rounded outward.

    Args:
        tensors: matrices (float16, bfloat16, float32, float64), as a list, a mapping, one matrix,
            or a 3-D tensor: a batch. Non-contiguous ones are copied.
        norm: 1, 2 or `float("inf")`.
        rtol: bound on `(upper - lower) / upper`; with `certify=False` on the estimated error of the
            Lanczos value. Rounding limits what can be certified: about 2e-13 for a side of 64, 1e-9
            for 4096.
        certify: prove an upper bound. Without it `upper` is infinite: an estimate from below is
            never called an upper bound.
        method: "lanczos", or "power": `max_passes` power iterations, the published method.
        start: start vectors (cols values each), for instance `right` of an earlier call; None
            entries and missing keys are seeded.
        seed: of the start vectors. Results depend on the seed and the matrix, not on the other
            matrices of the call nor on the number of threads.
        max_passes: limit on passes over each matrix.
        memory: bytes that one Gram matrix may take; beyond it the upper bound is Hoelder's
            $\sqrt{\|W\|_1 \|W\|_\infty}$ or Frobenius', proved but loose.

    Returns:
        A `SpectralNorms`, keyed like the input.

    Raises:
        ArgumentError: wrong type, dtype, shape or option; the message names the entry.
        NonFiniteError: an entry holds NaN or Inf.

    Example:
        >>> import torch, lipfast
        >>> matrices = [torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2, 8)]
        >>> norms = lipfast.spectral_norms(matrices)
        >>> norms
        SpectralNorms of 2 matrices
          0  [5.4649857, 5.46498844]  certified  cholesky
          1  [4, 4]  certified  holder
        >>> bool(((norms.upper - norms.lower) <= 1e-6 * norms.upper).all())
        True
    """
    norm = check_norm(norm)
    if method not in _METHODS:
        raise ArgumentError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if not 0 < rtol < 1:
        raise ArgumentError(f"rtol must lie between 0 and 1, got {rtol!r}")
    if max_passes < 1 or max_passes >= 2**31:
        raise ArgumentError(f"max_passes must be a positive 32-bit integer, got {max_passes!r}")
    keys, matrices = _matrices(tensors)
    if norm == 2:
        starts = _start_vectors(start, keys, matrices)
        flat = torch.ops.lipfast.spectral_norms(
            matrices,
            starts,
            certify,
            float(rtol),
            int(max_passes),
            method == "power",
            int(seed),
            int(memory),
        )
        lower, upper, passes, codes, right_values, left_values = flat
        if (codes < 0).any():
            index = int((codes < 0).nonzero()[0])
            raise NonFiniteError(f"{_name(keys[index])}: holds NaN or Inf; its norm is not defined")
        right = list(right_values.split([matrix.shape[1] for matrix in matrices]))
        left = list(left_values.split([matrix.shape[0] for matrix in matrices]))
        how = [_UPPER_METHODS[code] for code in codes.tolist()]
    else:
        lower, upper, right, left = _sum_norms(matrices, keys, norm)
        passes = torch.ones(len(matrices), dtype=torch.int64)
        how = ["sums"] * len(matrices)
        # The native op sets the mode of its threads itself.
        codes = torch.full((len(matrices),), 0 if denormals_flushed() else 1)
    certified = codes != 0
    result = SpectralNorms(lower, upper, certified, right, left, passes, how)
    return _keyed(result, keys) if isinstance(tensors, Mapping) else result


def _name(key: object) -> str:
    return f"matrix {key!r}" if isinstance(key, str) else f"matrix {key}"


def _matrices(tensors: object) -> tuple[list[Any], list[Tensor]]:
    """Keys and contiguous float32 or float64 matrices."""
    if isinstance(tensors, Tensor):
        if tensors.dim() not in (2, 3):
            raise ArgumentError(
                f"expected a matrix or a batch of them, got shape {tuple(tensors.shape)}"
            )
        tensors = list(tensors) if tensors.dim() == 3 else [tensors]
    if isinstance(tensors, Mapping):
        keys, values = list(tensors.keys()), list(tensors.values())
    elif isinstance(tensors, Sequence):
        keys, values = list(range(len(tensors))), list(tensors)
    else:
        raise ArgumentError(f"expected a list or a dict of matrices, got {type(tensors).__name__}")
    if not values:
        raise ArgumentError("no matrices were given")
    matrices = []
    for key, value in zip(keys, values, strict=True):
        matrix = check_floating(value, _name(key), 2)
        if matrix.numel() == 0:
            raise ArgumentError(f"{_name(key)}: is empty, shape {tuple(matrix.shape)}")
        matrices.append(native_dtype(matrix))
    return keys, matrices


def _start_vectors(start: object, keys: list[Any], matrices: list[Tensor]) -> list[Tensor]:
    if start is None:
        return []
    if isinstance(start, Mapping):
        given = [start.get(key) for key in keys]
    else:
        given = list(cast("Sequence[Tensor | None]", start))
    if len(given) != len(matrices):
        raise ArgumentError(f"start: {len(given)} vectors for {len(matrices)} matrices")
    vectors = []
    for key, vector, matrix in zip(keys, given, matrices, strict=True):
        if vector is None:
            vectors.append(torch.empty(0, dtype=torch.float64))
            continue
        name = f"start vector of {_name(key)}"
        checked = check_floating(vector, name, 1)
        if checked.shape[0] != matrix.shape[1]:
            raise ArgumentError(
                f"{name}: expected {matrix.shape[1]} values, got {checked.shape[0]}"
            )
        if not bool(torch.isfinite(checked).all()):
            raise NonFiniteError(f"{name}: holds NaN or Inf")
        vectors.append(checked.detach().double().contiguous())
    return vectors


def _sum_norms(
    matrices: list[Tensor], keys: list[Any], norm: Norm
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Largest column (1) or row (inf) sum of magnitudes, rounded outward."""
    lower, upper, right, left = [], [], [], []
    for key, matrix in zip(keys, matrices, strict=True):
        magnitudes = matrix.double().abs()
        sums = magnitudes.sum(dim=0 if norm == 1 else 1)
        top = int(sums.argmax())
        value = float(sums[top])
        if not math.isfinite(value) and not bool(torch.isfinite(matrix).all()):
            raise NonFiniteError(f"{_name(key)}: holds NaN or Inf; its norm is not defined")
        # Any order of summation of n non-negative terms: relative error at most gamma_{n-1}. A sum
        # that overflows is finite all the same: about the largest float64 at least.
        terms = magnitudes.numel() // sums.numel()
        slack = 1.0 + 2.0 * terms * 2.0**-53 if terms > 1 else 1.0
        lower.append(min(value, sys.float_info.max) / slack)
        upper.append(value * slack)
        if norm == 1:
            vector = torch.zeros(matrix.shape[1], dtype=torch.float64)
            vector[top] = 1.0
        else:
            vector = torch.where(matrix[top] < 0, -1.0, 1.0).double() / math.sqrt(matrix.shape[1])
        image = matrix.double() @ vector
        size = float(image.norm())
        right.append(vector)
        left.append(image / size if 0 < size < math.inf else image)
    return (
        torch.tensor(lower, dtype=torch.float64),
        torch.tensor(upper, dtype=torch.float64),
        right,
        left,
    )


def _keyed(result: SpectralNorms[Any], keys: list[Any]) -> SpectralNorms[Any]:
    fields = (
        result.lower,
        result.upper,
        result.certified,
        result.right,
        result.left,
        result.passes,
        result.method,
    )
    return SpectralNorms(*(dict(zip(keys, field, strict=True)) for field in fields))


@torch.library.register_fake("lipfast::spectral_norms")
def _spectral_norms_fake(  # noqa: PLR0917 (the schema's order)
    matrices: list[Tensor],
    start: list[Tensor],
    certify: bool,
    rtol: float,
    max_passes: int,
    power: bool,
    seed: int,
    memory: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = len(matrices)

    def vector(size: int, dtype: torch.dtype) -> Tensor:
        return matrices[0].new_empty((size,), dtype=dtype)

    return (
        vector(count, torch.float64),
        vector(count, torch.float64),
        vector(count, torch.int64),
        vector(count, torch.int64),
        vector(sum(matrix.shape[1] for matrix in matrices), torch.float64),
        vector(sum(matrix.shape[0] for matrix in matrices), torch.float64),
    )
