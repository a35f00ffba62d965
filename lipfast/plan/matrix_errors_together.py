"""Matrix functions with proved bounds of their errors, of many matrices and without a look.

What `matrix_errors` does with numbers of the host is done here with tensors, so that a device is
not waited for and `torch.func.vmap` takes many networks. Where a bound would need a decision, the
error is infinite, and somebody has to look. Norms are Frobenius norms rounded up, (..., 1, 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.elementwise_errors import plus, times
from lipfast.plan.parameter_rules import Enclosure
from lipfast.plan.product_errors import matrix_product
from lipfast.rounding import UNDERFLOW, gamma, u, widened

DEGREE = 18
# Of exponentials: matrices of norms up to 2^(this - 1).
_SQUARINGS = 12


def frobenius_norms(matrices: Tensor) -> Tensor:
    """Rounded up, as `frobenius_norm` of each; NaN or inf where an entry is."""
    if not matrices.numel():
        return matrices.new_zeros((*matrices.shape[:-2], 1, 1))
    peaks = matrices.abs().amax((-2, -1), keepdim=True)
    scaled = matrices / torch.where(peaks > 0, peaks, 1.0)
    lengths = scaled.square().sum((-2, -1), keepdim=True).sqrt()
    count = matrices.shape[-2] * matrices.shape[-1]
    return torch.where(peaks == 0, 0.0, lengths * peaks * (1.0 + 2 * gamma(count + 8)) + UNDERFLOW)


def _product_errors(terms: int, first: Tensor, second: Tensor) -> Tensor:
    """Norms of the roundings of ``fl(A B)``: at most ``gamma_{k+2} || |A| |B| ||``."""
    return gamma(terms + 2) * (1.0 + 4 * u) * first * second + UNDERFLOW


def _within_norms(results: Tensor, bounds: Tensor) -> Enclosure:
    """Every entry within a bound of the norm; infinite where this is no number."""
    if results.is_cuda and not products_are_ieee(results.device):
        bounds = torch.full_like(bounds, math.inf)
    bounds = torch.where(bounds < math.inf, bounds, math.inf)
    return Enclosure(results, bounds.expand_as(results))


def exponentials(matrix: Enclosure) -> Enclosure:
    r"""``exp(A)`` of each matrix: `exponential` with a schedule.

    $B = 2^{-s} A$ with $\|B\| \le 1/2$. In Horner's steps $T \leftarrow I + B T/k$ for n x n
    matrices $\|T\| \le \sqrt n + \|T\|/2k$, so that all are at most $2 \sqrt n$, with room for
    rounding while n < 2^30: errors are numbers that do not depend on A. A step passes one on by
    $1/2k$; its own is that of a product of norms 1/2 and $2 \sqrt n$ over k, and of a quotient and
    a sum. Squarings are those of `exponential`; the s of them that are needed count. Of matrices
    that take more than there are in the schedule, the error is infinite.
    """
    a = matrix.tensor
    n = a.shape[-1]
    norm = frobenius_norms(a)
    scale, needed = torch.ones_like(norm), []
    for step in range(_SQUARINGS):
        needed.append(norm > 2.0 ** (step - 1))
        scale = torch.where(needed[-1], 0.5 * scale, scale)
    b = a * scale
    identity = torch.eye(n, dtype=torch.float64, device=a.device)
    result, bound, largest = identity.expand_as(a), 0.0, 2.0 * math.sqrt(n) * (1 + 2.0**-20)
    product = gamma(n + 2) * (1.0 + 4 * u) * 0.5 * largest + UNDERFLOW
    for k in range(DEGREE, 0, -1):
        result = identity + (b @ result) / k
        local = product / k + 4 * u * (largest / k + largest)
        bound = widened(0.5 * bound / k + local + 2 * u * largest, 8)
    error = torch.full_like(norm, bound + 2.0 * 0.5**19 / math.factorial(19))
    given = frobenius_norms(matrix.radius)
    exact = given == 0
    skew = exact & (a == -a.mT).flatten(-2).all(-1)[..., None, None]
    for needs in needed:
        size = frobenius_norms(result)
        length = torch.where(skew, 1.0 + error, size)
        grown = 2.0 * length * error + error * error + _product_errors(n, size, size)
        result = torch.where(needs, result @ result, result)
        error = torch.where(needs, widened(grown, 8), error)
    # ||exp(A + E) - exp(A)|| <= ||E|| exp(||A|| + ||E||)
    moved = widened(given * torch.exp(norm + given), 32)
    error = torch.where(exact, error, widened(error + moved, 2))
    return _within_norms(result, torch.where(norm <= 2.0 ** (_SQUARINGS - 1), error, math.inf))


def solutions(m: Enclosure, b: Enclosure) -> Enclosure:
    r"""``M^{-1} B`` of each pair of matrices, with the errors of `solution`, proved afterwards."""
    found = torch.linalg.solve_ex(m.tensor, b.tensor)[0]
    inverse = torch.linalg.inv_ex(m.tensor)[0]
    given, right = frobenius_norms(m.radius), frobenius_norms(b.radius)
    reach, length = frobenius_norms(inverse), frobenius_norms(found)
    n = m.tensor.shape[-1]
    size = frobenius_norms(m.tensor)
    identity = torch.eye(n, dtype=torch.float64, device=inverse.device)
    defect = widened(frobenius_norms(identity - inverse @ m.tensor), 2)
    alpha = defect + _product_errors(n, reach, size) + reach * given + 4 * u * n
    residual = widened(frobenius_norms(b.tensor - m.tensor @ found), 2)
    residual = residual + _product_errors(n, size, length) + given * length + right
    residual = residual + 2 * u * frobenius_norms(b.tensor)
    bounds = widened(reach * residual / (1.0 - alpha), 32)
    return _within_norms(found, torch.where(alpha < 0.5, bounds, math.inf))


def solved(a: Enclosure, b: Enclosure, *, left: bool = True) -> Enclosure:
    """``A^-1 B``, or ``B A^-1 = (A^-T B^T)^T`` for `left` False."""
    if b.tensor.dim() == 1 or b.tensor.dim() == a.tensor.dim() - 1:
        if not left:
            raise ValueError("a vector of right-hand sides with left=False")
        columns = b.rearranged(lambda vector: vector.unsqueeze(-1))
        return solutions(a, columns).rearranged(lambda matrix: matrix.squeeze(-1))
    if left:
        return solutions(a, b)
    turned = (value.rearranged(lambda matrix: matrix.mT) for value in (a, b))
    return solutions(*turned).rearranged(lambda matrix: matrix.mT)


def householder_products(a: Enclosure, tau: Enclosure) -> Enclosure:
    r"""The first columns E of ``H_1 ... H_k``, ``H_i = I - tau_i v_i v_i^T``, of each matrix.

    With V = $(v_1 \dots v_k)$ and U the part of $V^T V$ above its diagonal, the product is $I - V
    M^{-1} D V^T$ with D = diag(tau) and M = I + D U (Schreiber and Van Loan, 1989; by induction:
    the last column of M^{-1} D is what $H_k$ adds). So that it takes a solution and three products,
    whatever k is, each with its error.
    """
    rows, columns = a.tensor.shape[-2:]
    count = tau.tensor.shape[-1]
    identity = torch.eye(rows, columns, dtype=torch.float64, device=a.tensor.device)

    def below(matrix: Tensor) -> Tensor:
        return matrix[..., :count].tril(-1)

    ones = identity[:, :count]
    v = Enclosure(below(a.tensor) + ones, below(a.radius))
    turned = v.rearranged(lambda matrix: matrix.mT)
    above = matrix_product(turned, v).rearranged(lambda matrix: matrix.triu(1))
    weights = tau.rearranged(lambda vector: vector[..., None])
    square = torch.eye(count, dtype=torch.float64, device=a.tensor.device)
    m = plus(Enclosure(square), times(weights, above))
    right = times(weights, turned.rearranged(lambda matrix: matrix[..., :columns]))
    reflected = matrix_product(v, solutions(m, right))
    return plus(Enclosure(identity), times(-1.0, reflected))
