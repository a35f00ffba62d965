"""A certified bracket of one spectral norm, from an SVD and one Cholesky factorisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53  # not that of `lipfast.rounding`: a mistake there must show here


def gamma(k: int) -> float:
    r"""$\gamma_k = k u / (1 - k u)$ (Higham 2002, section 3.1), widened for its own rounding."""
    return k * UNIT_ROUNDOFF / (1 - k * UNIT_ROUNDOFF) * (1 + 2.0**-20)


def scaled(matrix: Tensor) -> tuple[Tensor, int]:
    """The matrix in float64, smaller side first, times 2^-e: max |w| is in [1/2, 1); and e."""
    w = matrix.double()
    w = w if w.shape[0] <= w.shape[1] else w.T
    exponent = math.frexp(float(w.abs().max()))[1]
    half = exponent // 2
    return w * 2.0**-half * 2.0 ** -(exponent - half), exponent


def lower_bound(w: Tensor, vector: Tensor) -> float:
    r"""Proved lower bound of $\|W\|_2$ from any vector v, for W (n, m).

    $\frac{\|y\| (1 - \gamma_{n+2}) - \gamma_m \| |W| |v| \|}{\|v\| (1 + \gamma_{m+2})}$,
    y = fl(W v).
    """
    n, m = w.shape
    image = float((w @ vector).norm()) * (1 - gamma(n + 2))
    error = gamma(m + 1) * float((w.abs() @ vector.abs()).norm()) * (1 + 2.0**-20)
    value = (image - error) / (float(vector.norm()) * (1 + gamma(m + 2)))
    return max(value * (1 - 4 * UNIT_ROUNDOFF), float(w.abs().max()))


def upper_bound(w: Tensor, shift: float) -> float:
    r"""Proved upper bound of $\|W\|_2$ from a shift t; infinity where the factorisation fails.

    $\|W\|^2 \le t + \frac{\gamma_{n+2}}{1 - \gamma_{n+2}} \mathrm{tr} A + u \max a_{ii}
    + \gamma_m \|W\|_F^2 + 2^{-900}$, A = fl(t I - W W^T).
    """
    n, m = w.shape
    gram = w @ w.T
    shifted = shift * torch.eye(n, dtype=torch.float64) - gram
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed) != 0 or not bool(torch.isfinite(factor).all()):
        return math.inf
    diagonal = shifted.diagonal()
    rounding = (
        gamma(n + 2) / (1 - gamma(n + 2)) * float(diagonal.sum())
        + UNIT_ROUNDOFF * float(diagonal.abs().max())
        + gamma(m) * float(gram.trace()) / (1 - gamma(n + m))
    )
    square = math.nextafter(shift + rounding * (1 + 2.0**-20) + 2.0**-900, math.inf)
    return math.nextafter(math.sqrt(square), math.inf)


def spectral_norm_bracket(matrix: Tensor, rtol: float = 1e-6) -> tuple[float, float]:
    r"""Lower and upper bound of $\|W\|_2$, both proved, about `rtol` / 2 apart (relative).

    Args:
        matrix: (n, m), finite.
        rtol: excess of the first shift over the squared singular value; doubled until the
            factorisation succeeds.

    Returns:
        (lower, upper), float64.

    Example:
        >>> import torch
        >>> lower, upper = spectral_norm_bracket(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> lower <= 4.0 <= upper <= lower * (1 + 1e-6)
        True
    """
    if not bool(matrix.any()):
        return 0.0, 0.0
    w, exponent = scaled(matrix)
    _, values, right = torch.linalg.svd(w, full_matrices=False)
    square = float(values[0]) ** 2
    lower, upper, excess = lower_bound(w, right[0]), math.inf, rtol
    while upper == math.inf:
        upper = upper_bound(w, square * (1 + excess))
        excess *= 2
    return math.ldexp(lower, exponent), math.ldexp(upper, exponent)
