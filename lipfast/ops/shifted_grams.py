"""t I - B B^T of scaled matrices: what factorisations that prove upper bounds are of."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.ops.scaling import powers_of_two

# Exponents whose powers of two, and their inverses, are float64 numbers and not denormal.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -1000, 1022
# Far above every underflow, and below the square of any number that is scaled.
LEAST_SHIFT = 2.0**-150


def shifted_grams(
    matrices: Tensor, lower: Tensor, *, excess: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""$t_i I - B_i B_i^T$ with $B_i = 2^{-e_i} W_i$, in float64.

    $e_i$ is the exponent of a lower bound of $\|W_i\|_2$, and $t_i$ the scaled bound's square times
    1 + `excess`, at least $2^{-150}$. On CUDA one launch. Nothing is claimed of the result: what is
    made of it is checked by `cholesky_bounds`.

    Args:
        matrices: W, (n, s, l), float32 or float64, of any strides.
        lower: (n,), float64: near their norms.
        excess: of the shifts.

    Returns:
        (n, s, s), and $2^{-e}$ and t, (n,) each.

    Example:
        >>> import torch
        >>> matrices = torch.tensor([[[3.0, 4.0]]])
        >>> shifted_grams(matrices, torch.tensor([5.0]).double(), excess=0.5)[0]
        tensor([[[0.1953]]], dtype=torch.float64)
    """
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.lipfast.shifted_grams(matrices, lower, excess)
    return found


@torch.library.register_fake("lipfast::shifted_grams")
def _shifted_grams_fake(
    matrices: Tensor, lower: Tensor, excess: float
) -> tuple[Tensor, Tensor, Tensor]:
    count, side, _ = matrices.shape
    return lower.new_empty(count, side, side), lower.new_empty(count), lower.new_empty(count)


@torch.library.impl("lipfast::shifted_grams", "CPU")
def _shifted_grams_cpu(
    matrices: Tensor, lower: Tensor, excess: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Products by torch; the CPU's own certificate needs none, so this is for checks."""
    exponents = torch.frexp(lower).exponent.clamp(_LEAST_EXPONENT, _LARGEST_EXPONENT)
    scales = powers_of_two(-exponents)
    shifts = ((lower * scales).square() * (1 + excess)).clamp_min(LEAST_SHIFT)
    b = matrices.double() * scales[:, None, None]
    grams = -(b @ b.mT)
    grams.diagonal(dim1=1, dim2=2).add_(shifts[:, None])
    return grams, scales, shifts
