"""The three norms of vectors, and of linear maps between them: 1, 2 and inf."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, TypeAlias

from lipfast.errors import ArgumentError

Norm: TypeAlias = Literal[1, 2] | float

AnyNorm: TypeAlias = Norm | Literal["inf"]
"""What public calls take for a norm."""

_NORMS: dict[object, Norm] = {1: 1, 2: 2, math.inf: math.inf, "inf": math.inf}


def check_norm(norm: object) -> Norm:
    """`norm` as 1, 2 or `math.inf`.

    Args:
        norm: 1, 2, `float("inf")` or ``"inf"``.

    Raises:
        ArgumentError: it is something else.
    """
    number = isinstance(norm, (Real, str)) and not isinstance(norm, bool)
    if number and norm in _NORMS:
        return _NORMS[norm]
    raise ArgumentError(f"norm must be 1, 2 or inf, not {norm!r}")


def dual_norm(norm: Norm) -> Norm:
    r"""The q with 1/p + 1/q = 1: $\|A^T\|_p = \|A\|_q$, and $\|a\|_q = \max_{\|x\|_p = 1} |a x|$.

    Examples:
        >>> dual_norm(1), dual_norm(2), dual_norm(math.inf)
        (inf, 2, 1)
    """
    return {1: math.inf, math.inf: 1}.get(norm, norm)
