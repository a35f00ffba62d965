"""How far A is from B B^* + L L^*, by forming both."""

from __future__ import annotations

import torch
from torch import Tensor


def hermitian_residual(hermitian: Tensor, matrices: Tensor, factors: Tensor) -> Tensor:
    r"""$\|A_i - B_i B_i^* - L_i L_i^*\|_F^2$ and $\|B_i\|_F^2 + \|L_i\|_F^2$: (k, 2), float64.

    Args:
        hermitian: A, (k, n, n), complex; the lower triangle counts, and of the diagonal the real
            part.
        matrices: B, (k, n, m), complex; m may be 0.
        factors: L, (k, n, n), complex; the lower triangle counts.

    Example:
        >>> a = torch.tensor([[[5.0 + 0j]]])
        >>> hermitian_residual(a, torch.tensor([[[1j]]]), torch.tensor([[[2.0 + 0j]]]))
        tensor([[0., 5.]], dtype=torch.float64)
    """
    below = torch.tril(hermitian.to(torch.complex128), -1)
    diagonal = torch.diag_embed(hermitian.diagonal(dim1=1, dim2=2).real.double())
    b, factor = matrices.to(torch.complex128), torch.tril(factors.to(torch.complex128))
    residual = below + below.mH + diagonal - b @ b.mH - factor @ factor.mH
    sizes = b.abs().square().sum((1, 2)) + factor.abs().square().sum((1, 2))
    return torch.stack([residual.abs().square().sum((1, 2)), sizes], 1)
