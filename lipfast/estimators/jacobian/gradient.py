"""Jacobian norms that can be differentiated, with respect to samples and parameters."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.directions import steepest_direction
from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.lanczos import lanczos_triplets
from lipfast.estimators.jacobian.linearization import (
    DerivativeError,
    Footprint,
    Linearization,
    footprint,
    prefers_lanczos,
    require_constant,
)
from lipfast.estimators.jacobian.precision import Other
from lipfast.estimators.jacobian.rows import explicit_jacobians
from lipfast.norms import Norm


def differentiable_values(
    problem: SampleFunction, norm: Norm, method: str, memory: int, other: Other = lambda: None
) -> Tensor:
    r"""$\|J(x_b)\|_p = u_b^T J(x_b) v_b$ (B,), with a graph.

    u and v attain the norm and are constants: by Danskin's theorem the gradient of the right side
    is that of the left one where the maximiser is unique, and a subgradient elsewhere. So it takes
    one more backward pass, not the derivative of an eigenvalue solver.

    Args:
        problem: the model.
        norm: 1, 2 or inf.
        method: see `jacobian_norms`.
        memory: see `jacobian_norms`.
        other: gives the model in another precision, if it can.

    Raises:
        ArgumentError: the model has no second derivatives.
    """
    with differentiating():
        size = footprint(replace(problem, x=problem.x.detach()))
        if _is_constant(problem):
            return problem.x.new_zeros(len(problem.x))
        _require_second_derivatives(problem, other)
        left, right = _maximisers(problem, size, norm, method, memory)
        x = problem.x if problem.x.requires_grad else problem.x.detach().requires_grad_()
        output = problem.function(x)
        if not output.requires_grad:
            return x.new_zeros(len(x))
        (pulled,) = torch.autograd.grad(output, x, left, create_graph=True)
        return (pulled.reshape(len(x), -1) * right).sum(1)


def _is_constant(problem: SampleFunction) -> bool:
    """Whether the outputs do not depend on x, but perhaps on parameters.

    Raises:
        ArgumentError: they do depend on it, and autograd does not see it.
    """
    x = problem.x[:2].detach().requires_grad_()
    output = problem.function(x)
    if output.requires_grad:
        (gradient,) = torch.autograd.grad(output.sum(), x, allow_unused=True)
        if gradient is not None:
            return False
    require_constant(problem.function, x.detach(), output.detach())
    return True


def _require_second_derivatives(problem: SampleFunction, other: Other) -> None:
    """Some ops differentiate once only, and a gradient through them would silently lack a part.

    Rounding and underflow of float32 may look like that; in float64 they do not.
    """
    try:
        Linearization(problem.function, problem.x[:2]).columns(0, 1)
    except DerivativeError as error:
        wide = None if problem.x.dtype == torch.float64 else other()
        if wide is None:
            raise ArgumentError(f"create_graph: {error}") from error
        again = replace(wide, x=problem.x[:2].detach().double())
        _require_second_derivatives(again, other)


def _maximisers(
    problem: SampleFunction, size: Footprint, norm: Norm, method: str, memory: int
) -> tuple[Tensor, Tensor]:
    """Constants u (B, K) and v (B, D) with ``u^T J v = ||J||``."""
    detached = replace(problem, x=problem.x.detach())
    if prefers_lanczos(size, norm, method, problem.x.device):
        try:
            found = lanczos_triplets(detached, size, memory=memory)
            return found.left.detach(), found.right.detach()
        except DerivativeError as error:
            raise ArgumentError(f"create_graph: {error}") from error
    if method == "lanczos":
        raise ArgumentError("method='lanczos' computes norm 2 only; use 'rows' or 'auto'")
    pairs = [
        _maximising_vectors(block.double(), norm) for block in explicit_jacobians(detached, memory)
    ]
    left, right = (torch.cat(parts).to(problem.x.dtype) for parts in zip(*pairs, strict=True))
    return left, right


def _maximising_vectors(jacobians: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    right = steepest_direction(jacobians, norm)
    image = torch.bmm(jacobians, right.unsqueeze(2)).squeeze(2)
    if norm == 1:
        return image.sign(), right
    if math.isinf(norm):
        largest = jacobians.abs().sum(2).argmax(1)
        return torch.nn.functional.one_hot(largest, image.shape[1]).to(image.dtype), right
    length = image.norm(dim=1, keepdim=True)
    return image / torch.where(length > 0, length, 1), right
