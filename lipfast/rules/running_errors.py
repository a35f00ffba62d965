"""Running errors: what errors of the operands and the roundings of an operation make together.

Every function takes computed tensors x and elementwise bounds e of their errors (None: exact), and
returns a bound of the error of the computed result, for all true operands within e of x (running
error analysis, Higham, 2002, sec. 3.3). u is the unit roundoff. Two kinds of rules are made of
them: those of ops on activations (`Rule.error`), and those of ops on parameters
(`lipfast.plan.parameter_rules`). Each hands over its own room for the roundings of the bound
itself: more than is needed, and fixed, so that results stay the same to the last bit. For the same
reason sums, products and quotients are not shared: those of parameters know what is exact, and add
their terms in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, gamma, magnitude, widened

# Assumed of torch's float64 kernels, which promise no bound: the result differs from the
# function by at most this many unit roundoffs times (|x| + |f(x)| + offset). The vectorised
# elementary functions that they are made of (SLEEF, libm) stay within 1 to 2 ulp each.
EVALUATION_ROUNDOFFS = 32


def finished(error: Tensor, room: int) -> Tensor:
    """A bound with room for its own roundings (of each of its terms) and for what underflows."""
    return widened(error, room) + UNDERFLOW


def error_of_extremum(errors: Iterable[Tensor | None], output: Tensor) -> Tensor:
    """The largest error of the operands: a maximum (minimum, absolute value) moves by no more."""
    total = torch.zeros_like(output)
    for error in errors:
        if error is not None:
            total = torch.maximum(total, error)
    return total


def error_of_function(
    x: Tensor, error: Tensor | None, output: Tensor, *, slope: float, offset: float, room: int
) -> Tensor:
    """``sup |f'| e``, and the evaluation's own rounding.

    Args:
        x: the operand.
        error: of the operand.
        output: f(x).
        slope: sup |f'|.
        offset: see `EVALUATION_ROUNDOFFS`.
        room: roundings that the bound itself takes.
    """
    incoming = torch.zeros_like(x) if error is None else error
    rounding = (x.abs() + output.abs() + offset) * (EVALUATION_ROUNDOFFS * UNIT_ROUNDOFF)
    return finished(incoming * slope + rounding, room)


def error_of_linear_map(
    apply: Callable[[Tensor], Tensor],
    x: Tensor,
    error: Tensor | None,
    *,
    roundings: int,
    room: int,
) -> Tensor:
    """``gamma_k A (|x| + e / gamma_k)`` for a map whose entries have the magnitudes A.

    Holds for every order of summation, with or without fused multiply-add (Higham, 2002, sec. 3.5).

    Args:
        apply: the map A (perhaps with the magnitude of a constant that is added).
        x: the operand.
        error: of the operand.
        roundings: k, of one term on its way to the result.
        room: roundings that the bound itself takes.
    """
    relative = gamma(roundings)
    bound = apply(magnitude(x, error, relative)) * relative
    return finished(bound, room)


def error_of_bilinear_map(
    multiply: Callable[[Tensor, Tensor], Tensor],
    a: Tensor,
    b: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    *,
    roundings: int,
    room: int,
) -> Tensor:
    """``|A| e_B + e_A (|B| + e_B) + gamma_k |A| |B|`` for sums of products.

    Args:
        multiply: the map, with coefficients 0 and 1.
        a: the first operand, A.
        b: the second operand, B.
        first: error of A.
        second: error of B.
        roundings: k, of one product on its way to the result.
        room: roundings that the bound itself takes.
    """
    # The factor comes last: |A| gamma may underflow and then meet a large entry of B.
    total = multiply(a.abs(), b.abs()) * gamma(roundings)
    if second is not None:
        total = total + multiply(a.abs(), second)
    if first is not None:
        total = total + multiply(first, b.abs() if second is None else b.abs() + second)
    return finished(total, room)


def error_of_matmul(a: Tensor, b: Tensor, first: Tensor | None, second: Tensor | None) -> Tensor:
    """``|A| e_B + e_A (|B| + e_B) + gamma_{k+2} |A| |B|`` for k terms."""
    terms = a.shape[-1]
    return error_of_bilinear_map(
        torch.matmul, a, b, first, second, roundings=terms + 2, room=terms + 8
    )
