"""Per-sample norms of the gradient of a scalar function: a loss, a margin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, LipfastError
from lipfast.estimators.jacobian.function import (
    differentiating,
    model_function,
    module_of,
    ordinary,
)
from lipfast.estimators.jacobian.scalar_functions import require_gradient
from lipfast.estimators.jacobian.trust import require_autograd
from lipfast.estimators.options import check_flags
from lipfast.estimators.samples import check_inputs
from lipfast.norms import AnyNorm, Norm, check_norm, dual_norm
from lipfast.ops.jacobian_reduction import operator_norms
from lipfast.plan.untraceable import head_line, where

_DETACHED = (
    "the function's result does not depend on x through autograd: is it detached, or "
    "computed under torch.no_grad?"
)


def input_gradient_norms(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    norm: AnyNorm = 2,
    create_graph: bool = False,
) -> Tensor:
    r"""Norm of the gradient of a scalar function at every sample.

    The operator norm of the 1 x D Jacobian from (R^D, p) to R, which is the dual norm of the
    gradient: $\|\nabla f(x_b)\|_q$ with 1/p + 1/q = 1. So norm 2 is the Euclidean length, norm 1
    the largest entry and norm inf the sum of the magnitudes. One backward pass for all samples.

    Args:
        function: (B, D...) -> (B,) or (B, 1); sample b of the result must depend on sample b only:
            a loss with ``reduction="none"``, the margin between two logits. A module is evaluated
            in eval mode and its parameters get no gradients; any other function is called as it is,
            four times or more.
        x: samples (B, D...), floating.
        norm: 1, 2 or inf, of the inputs.
        create_graph: the norms can be differentiated with respect to x and the parameters.

    Returns:
        (B,), of the dtype of the gradient (float32 for the half types).

    Raises:
        ArgumentError: wrong samples, or the function is not scalar per sample, not floating, does
            not depend on x through autograd, mixes samples, is random or alters its gradients.
        NonFiniteError: a sample holds NaN or Inf.

    Examples:
        >>> import torch, lipfast
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> lipfast.input_gradient_norms(lambda x: x.square().sum(1) / 2, x)
        tensor([5., 1.])
    """
    norm = check_norm(norm)
    check_flags(create_graph=create_graph)
    (samples,) = check_inputs(x) if isinstance(x, Tensor) else check_inputs([x])
    if isinstance(function, nn.Module):
        module = module_of(function)
        with model_function(module, (samples,), create_graph=create_graph) as problem:
            require_autograd(problem, module, (samples,))
            return _gradient_norms(problem.function, problem.x, norm, create_graph)
    if not callable(function) or isinstance(function, type):
        what = function if isinstance(function, type) else type(function)
        raise ArgumentError(f"function must be callable, (B, D...) -> (B,), not {what.__name__}")
    return _gradient_norms(function, samples, norm, create_graph, check=True)


def _gradient_norms(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    norm: Norm,
    create_graph: bool,
    *,
    check: bool = False,
) -> Tensor:
    with differentiating():
        if not (create_graph and x.requires_grad):
            x = ordinary(x).detach().requires_grad_()
        values = _function_values(function, x)
        _check_scalar(values, len(x))
        (gradient,) = torch.autograd.grad(
            values.sum(), x, create_graph=create_graph, allow_unused=True
        )
        if gradient is None:
            raise ArgumentError(_DETACHED)
        if check:
            require_gradient(function, x, values, gradient)
        if not create_graph:
            return operator_norms(gradient.reshape(len(x), 1, -1), norm)
        # A zero gradient has a zero subgradient; vector_norm's own is that.
        flat = gradient.reshape(len(x), -1)
        norms: Tensor = torch.linalg.vector_norm(flat, dual_norm(norm), dim=1)
        return norms


def _function_values(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        return function(x.clone())  # it may write into its argument
    except (LipfastError, MemoryError):
        raise
    except Exception as error:  # user code runs here: anything may come out
        raise ArgumentError(
            f"the function cannot be evaluated on samples of shape {tuple(x.shape)}"
            f"{where(error)}: {head_line(error)}"
        ) from error


def _check_scalar(values: object, samples: int) -> None:
    if not isinstance(values, Tensor):
        raise ArgumentError(f"the function returns a {type(values).__name__}, expected a tensor")
    if not values.dtype.is_floating_point:
        raise ArgumentError(f"the function returns dtype {values.dtype}: it has no gradient")
    if tuple(values.shape) not in ((samples,), (samples, 1)):
        raise ArgumentError(
            f"the function returns shape {tuple(values.shape)} for {samples} samples, expected "
            f"({samples},): one number per sample (reduction='none')"
        )
    if not values.requires_grad:
        raise ArgumentError(_DETACHED)
