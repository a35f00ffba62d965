"""Norms of given Jacobians, a batch at a time or in blocks of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.norms import Norm, check_norm
from lipfast.ops._arguments import check_floating, check_same_device, native_dtype


def jacobian_reduction(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Spectral and Frobenius norms $\|J_b\|_2$, $\|J_b\|_F$ of B Jacobians, without an SVD.

    The Gram matrix of the smaller of K and D is accumulated in float64 and reduced to its largest
    eigenvalue inside the kernel, several Jacobians in the lanes of a vector. When both exceed 64,
    Lanczos.

    Values of derivatives, not certified bounds; relative error about 1e-14 in float64 (5e-14 and
    5e-7 estimated, for float64 and float32, where Lanczos is used) plus one rounding to the dtype.

    Args:
        jacobian: (B, K, D), float16, bfloat16, float32 or float64. A Jacobian with NaN or Inf gives
            NaN.

    Returns:
        Two tensors (B,) of the Jacobian's dtype (float32 for the half types).

    Raises:
        ArgumentError: wrong type, dtype or shape.

    Example:
        >>> import torch
        >>> from lipfast.ops.jacobian_reduction import jacobian_reduction
        >>> spectral, frobenius = jacobian_reduction(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
        >>> spectral, frobenius
        (tensor([4.]), tensor([5.]))
    """
    spectral, frobenius = torch.ops.lipfast.jacobian_reduction(native_dtype(_nonempty(jacobian)))
    return spectral, frobenius


def _nonempty(jacobian: Tensor) -> Tensor:
    """Jacobians (B, K, D) that are not empty, detached from the graph of autograd."""
    jacobian = check_floating(jacobian, "jacobian", 3)
    if jacobian.shape[1] == 0 or jacobian.shape[2] == 0:
        raise ArgumentError(f"jacobian: shape {tuple(jacobian.shape)} holds empty Jacobians")
    return jacobian.detach()


@torch.library.register_fake("lipfast::jacobian_reduction")
def _jacobian_reduction_fake(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    return jacobian.new_empty((jacobian.shape[0],)), jacobian.new_empty((jacobian.shape[0],))


def operator_norms(jacobian: Tensor, norm: Norm = 2) -> Tensor:
    r"""Operator norms $\|J_b\|_p$ of B Jacobians.

    Norm 2 is the largest singular value (`jacobian_reduction`), 1 the largest absolute column sum,
    inf the largest absolute row sum; sums are accumulated in float64. Not certified.

    Args:
        jacobian: (B, K, D), a floating dtype.
        norm: 1, 2 or inf.

    Returns:
        (B,) of the Jacobian's dtype (float32 for the half types).

    Raises:
        ArgumentError: wrong type, dtype, shape or norm.

    Example:
        >>> import torch
        >>> from lipfast.ops.jacobian_reduction import operator_norms
        >>> operator_norms(torch.tensor([[[3.0, -1.0], [0.0, 4.0]]]), norm=1)
        tensor([5.])
    """
    norm = check_norm(norm)
    if norm == 2:
        return jacobian_reduction(jacobian)[0]
    jacobian = _nonempty(jacobian)
    sums = torch.linalg.vector_norm(jacobian, 1, dim=1 if norm == 1 else 2, dtype=torch.float64)
    norms: Tensor = sums.amax(1).to(torch.promote_types(jacobian.dtype, torch.float32))
    return norms


# 2^1000 and 2^-1000 are normal float64, and so are squares of what they scale to about 1.
_LARGEST_EXPONENT = 1000


class RowReduction:
    r"""Norms of B Jacobians of K rows that come in blocks, never all at once.

    Column sums, the largest row sum and the squares are accumulated in float64. For the spectral
    norm the Gram matrix $J_b^T J_b$ (D x D, float64) is accumulated when D <= K; otherwise the
    rows are kept, because their Gram matrix needs all pairs of them, and they are the smaller side.

    Args:
        samples: B.
        outputs: K, so many rows are to come.
        inputs: D.
        spectral: whether `norms(2)` will be asked for; without it no Gram matrix is formed.
        device: where the rows are.

    Example:
        >>> import torch
        >>> from lipfast.ops.jacobian_reduction import RowReduction
        >>> reduction = RowReduction(samples=1, outputs=2, inputs=2)
        >>> reduction.add(torch.tensor([[[3.0, 0.0]]]))
        >>> reduction.add(torch.tensor([[[0.0, 4.0]]]))
        >>> [float(reduction.norms(norm)) for norm in (1, 2, float("inf"))]
        [4.0, 4.0, 4.0]
        >>> float(reduction.frobenius())
        5.0
    """

    def __init__(
        self,
        samples: int,
        outputs: int,
        inputs: int,
        *,
        spectral: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        if outputs < 1 or inputs < 1:
            raise ArgumentError(f"Jacobians of {outputs} x {inputs} are empty")
        self.shape = (samples, outputs, inputs)
        self.rows = 0
        self.spectral = spectral
        self._dtype = torch.float32
        self._columns = torch.zeros(samples, inputs, dtype=torch.float64, device=device)
        self._largest_row = torch.zeros(samples, dtype=torch.float64, device=device)
        # Squares of float64 overflow: what is squared is scaled by a power of two per sample.
        self._scale = torch.full_like(self._largest_row, -_LARGEST_EXPONENT)
        self._squares = torch.zeros_like(self._largest_row)
        self._gram: Tensor | None = None
        self._kept: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Take the next rows (B, k, D), a floating dtype.

        Raises:
            ArgumentError: wrong type, dtype, shape or device, or more rows than were announced.
        """
        rows = check_floating(rows, "rows", 3).detach()
        check_same_device(rows, self._columns, "rows")
        samples, outputs, inputs = self.shape
        if (rows.shape[0], rows.shape[2]) != (samples, inputs):
            raise ArgumentError(
                f"rows: expected ({samples}, rows, {inputs}), got {tuple(rows.shape)}"
            )
        self.rows += rows.shape[1]
        if self.rows > outputs:
            raise ArgumentError(f"rows: {self.rows} were given and {outputs} announced")
        if rows.shape[1] == 0 or samples == 0:
            return
        self._dtype = torch.promote_types(self._dtype, rows.dtype)
        wide = rows.double()
        magnitudes = wide.abs()
        self._columns += magnitudes.sum(1)
        self._largest_row = torch.maximum(self._largest_row, magnitudes.sum(2).amax(1))
        scaled = wide * self._rescale(magnitudes.amax((1, 2)))[:, None, None]
        self._squares += scaled.square().sum((1, 2))
        if not self.spectral:
            return
        if inputs > outputs:
            self._kept.append(rows)
        elif self._gram is None:
            self._gram = scaled.mT @ scaled
        else:
            self._gram.baddbmm_(scaled.mT, scaled)

    def _rescale(self, peak: Tensor) -> Tensor:
        """Factors (B,) for the new rows; what was summed before is brought to the same scale."""
        exponent = torch.frexp(torch.where(torch.isfinite(peak), peak, 0.0))[1]
        wanted = torch.where(peak > 0, exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT), 0)
        scale = torch.where(peak > 0, torch.maximum(self._scale, wanted.double()), self._scale)
        factor = torch.exp2(self._scale - scale).square()
        self._scale = scale
        self._squares *= factor
        if self._gram is not None:
            self._gram *= factor[:, None, None]
        return torch.exp2(-scale)

    def frobenius(self) -> Tensor:
        """Frobenius norms (B,)."""
        self._require_all()
        return (self._squares.sqrt() * torch.exp2(self._scale)).to(self._dtype)

    def norms(self, norm: Norm = 2) -> Tensor:
        """Operator norms (B,) for p = 1, 2 or inf.

        Raises:
            ArgumentError: rows are missing, or `spectral=False` and the norm is 2.
        """
        norm = check_norm(norm)
        self._require_all()
        if norm == 1:
            return self._columns.amax(1).to(self._dtype)
        if math.isinf(norm):
            # amax over a NaN is NaN already; maximum() keeps it.
            return self._largest_row.to(self._dtype)
        if not self.spectral:
            raise ArgumentError("norm 2 was not asked for: RowReduction(..., spectral=True)")
        if self._kept:
            return jacobian_reduction(torch.cat(self._kept, 1))[0]
        assert self._gram is not None
        top = jacobian_reduction(self._gram)[0].sqrt()
        return (top * torch.exp2(self._scale)).to(self._dtype)

    def _require_all(self) -> None:
        if self.rows != self.shape[1]:
            raise ArgumentError(f"{self.rows} rows were given and {self.shape[1]} announced")
