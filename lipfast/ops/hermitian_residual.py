"""How far A is from B B^* + L L^*: what turns a complex factor by any library into a proof."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_device, check_same_device, check_terms

_EDGE_OF_TILES = 32


def hermitian_residual(hermitian: Tensor, matrices: Tensor, factors: Tensor) -> Tensor:
    r"""Squared sizes of $R_i = A_i - B_i B_i^* - L_i L_i^*$ and of $(B_i, L_i)$, in float64.

    $\|R_i\|_F^2$ and $\|B_i\|_F^2 + \|L_i\|_F^2$. The real and the imaginary part of every entry
    are plain sums of products in any order and in IEEE float64: the entry's error beside one
    subtraction is at most $\sqrt 2 \gamma_{2 (n + m)}$ times the sum of magnitudes, whatever
    computed L. On CUDA this is lipfast's own kernel, because libraries may emulate float64 there.

    Args:
        hermitian: A, (k, n, n), complex128; only the lower triangles are read, and of the diagonals
            the real parts.
        matrices: B, (k, n, m), complex128; m may be 0.
        factors: L, (k, n, n), complex128; only the lower triangles are read.

    Returns:
        (k, 2), float64, not rounded in any direction.

    Raises:
        ArgumentError: wrong types, dtypes, shapes or devices, or 2 (n + m) is 2^30 or more.

    Example:
        >>> import torch
        >>> from lipfast.ops.hermitian_residual import hermitian_residual
        >>> a = torch.tensor([[[6.0]]], dtype=torch.complex128)
        >>> b, factor = torch.tensor([[[1j]]]).to(a), torch.tensor([[[2.0]]]).to(a)
        >>> hermitian_residual(a, b, factor)
        tensor([[1., 5.]], dtype=torch.float64)
    """
    for name, tensor in (("hermitian", hermitian), ("matrices", matrices), ("factors", factors)):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.complex128 or tensor.dim() != 3:
            raise ArgumentError(
                f"{name}: expected complex128 with 3 dimensions, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        check_device(tensor.device, f"{name}: is")
        check_same_device(tensor, hermitian, name)
    count, side, _ = hermitian.shape
    if side == 0 or hermitian.shape != factors.shape or hermitian.shape[2] != side:
        raise ArgumentError(
            "expected hermitian and factors of one shape (k, n, n), n > 0, got "
            f"{tuple(hermitian.shape)} and {tuple(factors.shape)}"
        )
    if matrices.shape[:2] != (count, side):
        raise ArgumentError(f"matrices: expected ({count}, {side}, m), got {tuple(matrices.shape)}")
    check_terms(2 * (side + matrices.shape[2]), "matrices")
    pairs = [
        torch.view_as_real(tensor.detach().resolve_conj().contiguous())
        for tensor in (hermitian, matrices, factors)
    ]
    partial: Tensor = torch.ops.lipfast.hermitian_residual(*pairs)
    return partial.sum(1)


@torch.library.register_fake("lipfast::hermitian_residual")
def _hermitian_residual_fake(hermitian: Tensor, matrices: Tensor, factors: Tensor) -> Tensor:
    tiles = 1
    if hermitian.device.type != "cpu":
        edge = (hermitian.shape[1] + _EDGE_OF_TILES - 1) // _EDGE_OF_TILES
        tiles = edge * (edge + 1) // 2
    return hermitian.new_empty((hermitian.shape[0], tiles, 2))


@torch.library.impl("lipfast::hermitian_residual", "CPU")
def _hermitian_residual_cpu(hermitian: Tensor, matrices: Tensor, factors: Tensor) -> Tensor:
    """One tile per matrix; the CPU's own certificate needs no residual, so this is for checks."""
    a, b = torch.view_as_complex(hermitian), torch.view_as_complex(matrices)
    factor = torch.view_as_complex(factors).tril()
    products = torch.baddbmm(b @ b.mH, factor, factor.mH)
    residual = (a - products).tril()
    diagonals = torch.view_as_real(residual).diagonal(dim1=1, dim2=2)  # (k, 2, n)
    diagonals[:, 1] = 0  # taken off a sum of squares it might hide what is beside it
    squares = 2 * torch.view_as_real(residual).square().sum((1, 2, 3))
    squares -= diagonals.square().sum((1, 2))
    sizes = products.diagonal(dim1=1, dim2=2).real.sum(1)
    return torch.stack([squares, sizes], 1)[:, None]
