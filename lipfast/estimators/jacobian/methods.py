"""Norms of the Jacobians of any function: from their rows, or from products with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.lanczos import lanczos_triplets
from lipfast.estimators.jacobian.linearization import DerivativeError, footprint, prefers_lanczos
from lipfast.estimators.jacobian.rows import row_norms
from lipfast.norms import Norm

Method = Literal["auto", "fused", "rows", "lanczos"]
METHODS: tuple[str, ...] = get_args(Method)


@dataclass(frozen=True)
class JacobianNorms:
    """Per-sample Jacobian norms and how they were computed.

    Attributes:
        values: (B,).
        method: ``fused``, ``rows`` or ``lanczos``.
        residuals: (B,) for Lanczos, else None: ``||J^T u - value v|| / value`` of the last vectors.
            A singular value lies within that relative distance of `value`; the error of the largest
            one is of the order of its square.
        passes: (B,) for Lanczos, else None: products with J and J^T that the sample took.
    """

    values: Tensor
    method: str
    residuals: Tensor | None = None
    passes: Tensor | None = None


def function_jacobian_norms(
    problem: SampleFunction, *, norm: Norm, method: Method, memory: int
) -> JacobianNorms:
    """Norms of the Jacobians of any function that treats samples apart.

    Raises:
        ArgumentError: `method` is ``lanczos`` and the norm is not 2.
        DerivativeError: `method` is ``lanczos`` and the function has no Jacobian-vector products.
    """
    if method == "lanczos" and norm != 2:
        raise ArgumentError("method='lanczos' computes norm 2 only; use 'rows' or 'auto'")
    with differentiating():
        size = footprint(problem)
        if prefers_lanczos(size, norm, method, problem.x.device):
            try:
                found = lanczos_triplets(problem, size, memory=memory)
                return JacobianNorms(found.values, "lanczos", found.residuals, found.passes)
            except DerivativeError:
                if method == "lanczos":
                    raise
        return JacobianNorms(row_norms(problem, size, norm, memory), "rows")
