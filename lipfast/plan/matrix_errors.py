"""Matrix functions of parameters with proved bounds of their errors: what orthogonal maps need.

Norms are Frobenius norms rounded up, which are submultiplicative and at least the norm 2. A bound
of the norm of an error is a bound of each of its entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.matrix_errors_together import (
    DEGREE,
    exponentials,
    householder_products,
    solved,
)
from lipfast.plan.parameter_rules import Enclosure, parameter_rule
from lipfast.rounding import UNDERFLOW, gamma, u, widened


def frobenius_norm(matrix: Tensor) -> float:
    """Rounded up. Scaled by the largest entry: squares of small ones would vanish otherwise."""
    peak = float(matrix.abs().max()) if matrix.numel() else 0.0
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    length = float((matrix / peak).square().sum().sqrt())
    return frobenius_of_scaled(length, peak, matrix.numel())


def frobenius_of_scaled(length: float, peak: float, count: int) -> float:
    """A Frobenius norm, rounded up, from that of the entries divided by the largest of them."""
    if peak == 0.0 or not math.isfinite(peak):
        return peak
    return length * peak * (1.0 + 2 * gamma(count + 8)) + UNDERFLOW


_norm_of = frobenius_norm


def _product_error(a: Tensor, b: Tensor) -> float:
    """Norm of the rounding of ``fl(A B)``: at most ``gamma_{k+2} || |A| |B| ||``."""
    return gamma(a.shape[-1] + 2) * (1.0 + 4 * u) * _norm_of(a) * _norm_of(b) + UNDERFLOW


def _within(result: Tensor, bound: float) -> Enclosure:
    if result.is_cuda and not products_are_ieee(result.device):
        bound = math.inf
    return Enclosure(result, torch.full_like(result, bound))


def _of_each(function: Callable[..., Enclosure], *operands: Enclosure) -> Enclosure:
    """A function of matrices (and of a vector for each), applied along the leading dimensions."""
    leading = operands[0].tensor.shape[:-2]
    if any(value.tensor.shape[: len(leading)] != leading for value in operands):
        raise ValueError("expected tensors with the same leading dimensions")
    if not leading:
        return function(*operands)
    columns = [_unbound(value, len(leading)) for value in operands]
    found = [function(*entries) for entries in zip(*columns, strict=True)]
    errors = [value.radius for value in found]
    tensor = torch.stack([value.tensor for value in found])
    shape = (*leading, *tensor.shape[1:])
    return Enclosure(tensor.reshape(shape), torch.stack(errors).reshape(shape))


def _unbound(value: Enclosure, leading: int) -> list[Enclosure]:
    both = (tensor.flatten(0, leading - 1).unbind() for tensor in (value.tensor, value.radius))
    return [Enclosure(tensor, error) for tensor, error in zip(*both, strict=True)]


@parameter_rule("matrix_exp", "linalg_matrix_exp", together=exponentials)
def matrix_exponential(matrix: Enclosure) -> Enclosure:
    """``exp(A)`` of each matrix, see `exponential`."""
    return _of_each(exponential, matrix)


def exponential(value: Enclosure) -> Enclosure:
    r"""``exp(A)`` by scaling, Taylor's series of degree 18 and squaring, with its error's norm.

    $B = 2^{-s} A$ with $\|B\| \le 1/2$ (exact). The remainder is at most $2 \|B\|^{19}/19!$;
    Horner's steps $T \leftarrow I + B T/k$ pass errors on by $\|B\|/k$; squarings
    $X \leftarrow X^2$ by $2 \|X\|_2 + \delta$. An exactly skew matrix has an orthogonal
    exponential, so that $\|X\|_2 \le 1 + \delta$; others take the Frobenius norm. An error E of A
    moves the result by at most $\|E\| e^{\|E\|}$ times $e^{\|A\|}$ (1 for a skew A, when E is
    skew too; not used).
    """
    a = value.tensor
    given = 0.0 if value.error is None else _norm_of(value.error)
    if not bool(torch.isfinite(a).all()):
        return _within(a, math.inf)
    skew = given == 0.0 and bool((a == -a.mT).all())
    norm = _norm_of(a)
    steps = max(0, math.frexp(norm)[1] + 1)
    b = a * 2.0**-steps
    small = norm * 2.0**-steps
    identity = torch.eye(len(a), dtype=torch.float64, device=a.device)
    result, error = identity.clone(), 0.0
    for k in range(DEGREE, 0, -1):
        product = b @ result
        local = _product_error(b, result) / k + 4 * u * (_norm_of(product) / k + _norm_of(result))
        result = identity + product / k
        error = widened(small * error / k + local + 2 * u * _norm_of(result), 8)
    error += 2.0 * small**19 / math.factorial(19)
    for _ in range(steps):
        length = 1.0 + error if skew else _norm_of(result)
        local = _product_error(result, result)
        result = result @ result
        error = widened(2.0 * length * error + error * error + local, 8)
    if given > 0.0:
        # ||exp(A + E) - exp(A)|| <= ||E|| exp(||A|| + ||E||)
        try:
            error += widened(given * math.exp(norm + given), 32)
        except OverflowError:
            error = math.inf
    return _within(result, error)


@parameter_rule("linalg_solve", together=solved)
def linalg_solve(a: Enclosure, b: Enclosure, *, left: bool = True) -> Enclosure:
    """``A^-1 B``, or ``B A^-1 = (A^-T B^T)^T`` for `left` False."""
    if b.tensor.dim() == 1 or b.tensor.dim() == a.tensor.dim() - 1:
        if not left:
            raise ValueError("a vector of right-hand sides with left=False")
        columns = b.rearranged(lambda vector: vector.unsqueeze(-1))
        return _of_each(solution, a, columns).rearranged(lambda matrix: matrix.squeeze(-1))
    if left:
        return _of_each(solution, a, b)
    return _transposed(_of_each(solution, _transposed(a), _transposed(b)))


def _transposed(value: Enclosure) -> Enclosure:
    return value.rearranged(lambda matrix: matrix.mT)


def solution(m: Enclosure, b: Enclosure) -> Enclosure:
    r"""``X = M^-1 B`` with an error proved afterwards.

    With C an approximate inverse and $\alpha = \|I - C M\| < 1$:
    $\|M^{-1} B - \hat X\| \le \|C (B - M \hat X)\| / (1 - \alpha)$, for all M and B within their
    errors (Rump, Acta Numerica 19, 2010).
    """
    try:
        found = torch.linalg.solve(m.tensor, b.tensor)
        inverse = torch.linalg.inv(m.tensor)
    except RuntimeError:  # singular
        return _within(torch.full_like(b.tensor, math.nan), math.inf)
    given = 0.0 if m.error is None else _norm_of(m.error)
    right = 0.0 if b.error is None else _norm_of(b.error)
    reach, length = _norm_of(inverse), _norm_of(found)
    identity = torch.eye(len(inverse), dtype=torch.float64, device=inverse.device)
    defect = widened(_norm_of(identity - inverse @ m.tensor), 2)
    alpha = defect + _product_error(inverse, m.tensor) + reach * given + 4 * u * len(inverse)
    if not alpha < 0.5:
        return _within(found, math.inf)
    residual = widened(_norm_of(b.tensor - m.tensor @ found), 2)
    residual += _product_error(m.tensor, found) + given * length + right
    residual += 2 * u * _norm_of(b.tensor)
    return _within(found, widened(reach * residual / (1.0 - alpha), 32))


@parameter_rule("linalg_householder_product", together=householder_products)
def householder_product(a: Enclosure, tau: Enclosure) -> Enclosure:
    """Products of reflections, for each matrix, see `reflections`."""
    return _of_each(reflections, a, tau)


def reflections(value: Enclosure, tau: Enclosure) -> Enclosure:
    r"""The first columns of ``H_1 ... H_k``, ``H_i = I - tau_i v_i v_i^T``, with its error's norm.

    $v_i$ has a 1 at i and the entries of A below. Reflections are applied from the last on:
    $Y \leftarrow Y - (\tau v)(v^T Y)$, which passes an error of Y on by
    $\|H\|_2 = \max(1, |1 - \tau \|v\|^2|)$ and adds that of $\tau$ and v, and its own rounding.
    """
    rows, columns = value.tensor.shape
    result = torch.eye(rows, columns, dtype=torch.float64, device=value.tensor.device)
    errors, moved = tau.radius, value.radius
    error = 0.0
    for index in range(len(tau.tensor) - 1, -1, -1):
        v = value.tensor[:, index].clone()
        v[:index], v[index] = 0.0, 1.0
        t, off = float(tau.tensor[index]), float(errors[index])
        length, shift = _norm_of(v), _norm_of(moved[index + 1 :, index])
        turned, size = v @ result, _norm_of(result)
        step = (t * v)[:, None] * turned
        # (v + e) (v + e)^T with |tau' - tau| <= off, against v v^T.
        parameters = off * (length + shift) ** 2 + abs(t) * (2 * length * shift + shift**2)
        rounding = abs(t) * length * length * size * (gamma(rows + 2) + 8 * u)
        result = result - step
        largest = max(1.0, widened(abs(1.0 - t * length * length), 4) + 8 * u)
        error = (largest + parameters) * error + parameters * size + rounding
        error = widened(error + 2 * u * _norm_of(result), 8)
    return _within(result, error)
