"""Per-sample norms of the input-output Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NoReturn, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import (
    check_state,
    model_function,
    module_of,
    ordinary,
    state_dtype,
)
from lipfast.estimators.jacobian.gradient import differentiable_values
from lipfast.estimators.jacobian.linearization import is_small
from lipfast.estimators.jacobian.methods import (
    METHODS,
    JacobianNorms,
    Method,
    function_jacobian_norms,
)
from lipfast.estimators.jacobian.networks import chain_norms, fused_chain, plan_jacobian_norms
from lipfast.estimators.jacobian.precision import other_precision
from lipfast.estimators.jacobian.trust import require_autograd
from lipfast.estimators.options import check_flags, check_options, refuse
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.samples import Data, check_inputs, read_samples
from lipfast.norms import AnyNorm, Norm
from lipfast.plan.cache import cached_plan, is_known, known_plan
from lipfast.plan.checked import resolve
from lipfast.plan.modules import lock_of
from lipfast.plan.state import entries_of
from lipfast.plan.trace import Source, trace


class _NormOptions(TypedDict, total=False):
    """Of `jacobian_norms`, but for `details`, which decides what is returned."""

    norm: AnyNorm
    method: Method
    memory: int
    progress: bool | None
    domain: None
    create_graph: bool


@overload
def jacobian_norms(
    model: Source,
    x: Data | Sequence[Tensor],
    *,
    details: Literal[False] = False,
    **options: Unpack[_NormOptions],
) -> Tensor: ...
@overload
def jacobian_norms(
    model: Source,
    x: Data | Sequence[Tensor],
    *,
    details: Literal[True],
    **options: Unpack[_NormOptions],
) -> JacobianNorms: ...
def jacobian_norms(
    model: Source,
    x: Data | Sequence[Tensor],
    *,
    norm: AnyNorm = 2,
    method: Method = "auto",
    memory: int = 1 << 30,
    progress: bool | None = None,
    domain: object = None,
    create_graph: bool = False,
    details: bool = False,
    **_elsewhere: NoReturn,
) -> Tensor | JacobianNorms:
    r"""Norm of the input-output Jacobian of a model at every sample, ``||d f / d x (x_b)||_p``.

    Evaluated in eval mode; the model is left as it was found, and its parameters get no gradients.
    All outputs together are one vector of K numbers, all inputs of a sample together another one
    of D. Each value is a lower estimate of the Lipschitz constant wherever the model is
    differentiable; it is not certified (rounding; at a kink autograd's value need not be a
    derivative).

    Args:
        model: a module that treats the samples of a batch apart, an exported program, or the path
            of a ``.pt2`` file.
        x: samples (B, D...), floating; a tuple of tensors for a model with several inputs; or a
            Dataset or DataLoader as for `lipfast.lower_bound`, whose batches are read once.
        norm: 1 (largest absolute column sum), 2 (largest singular value) or inf (row sum).
        method: ``fused`` for the native op (norm 2, recognised chains), ``rows`` for explicit
            Jacobians, ``lanczos`` for products with J and J^T only (norm 2). ``auto`` takes the
            fused op where it can, Lanczos where K and D both exceed 64 (128 on a device), else
            rows.
        memory: bytes for Jacobians and intermediate results; samples go in blocks of that size,
            and rows in blocks where a single sample exceeds it.
        progress: None shows it on a terminal after two seconds, False never, True from the start
            and everywhere.
        domain: has no meaning here, as every norm is of one sample; the bounds take one.
        create_graph: the norms can be differentiated once, with respect to x and the parameters:
            the gradient of ``u^T J v`` with u and v fixed, a subgradient where the largest singular
            value (row, column) is not unique. Not with the fused op, and of tensors only.
        details: return `JacobianNorms` with residuals and passes.

    Returns:
        (B,), float64 for a float64 model, else float32. NaN where the derivative is not finite.
        Relative error about 1e-6 in float32, 1e-13 in float64, where products with J are accurate.

    Raises:
        ArgumentError: the samples have the wrong shape, dtype or device, the output is not
            floating, `method` does not fit, or an option has no meaning here; says where it has
            one. Or the model mixes the samples of a batch, is random, jumps, or alters its
            gradients (docs/bounds.md): that is looked for wherever autograd differentiates the
            module itself.
        NonFiniteError: a sample or a parameter holds NaN or Inf.
        TraceError: an exported program was exported in training mode.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])
        >>> lipfast.jacobian_norms(model, x)
        tensor([3., 4., 0.])
        >>> penalty = lipfast.jacobian_norms(model, x, create_graph=True).max()
        >>> torch.autograd.grad(penalty, model[0].weight)[0]
        tensor([[0., 0.],
                [0., 1.]])
    """
    refuse("jacobian_norms", _elsewhere)
    norm = check_options(norm, None, memory, progress)
    if domain is not None:
        raise ArgumentError(
            "domain has no meaning for jacobian_norms: each norm is of one sample, wherever it "
            "lies; bounds, lower_bound and upper_bound take one"
        )
    check_flags(create_graph=create_graph, details=details)
    if not isinstance(method, str) or method not in METHODS:
        raise ArgumentError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if create_graph and method == "fused":
        raise ArgumentError(
            "the fused op has no backward pass: use method='auto' with create_graph"
        )
    module = module_of(model)
    of_inputs = partial(
        _input_norms, module, norm=norm, method=method, memory=memory, create_graph=create_graph
    )
    if isinstance(x, (Dataset, DataLoader)):
        if create_graph:
            raise ArgumentError(
                "create_graph needs tensors, which can be differentiated: a Dataset or DataLoader "
                "is read batch by batch"
            )
        parts: list[JacobianNorms] = []
        with (
            read_samples(x) as samples,
            shown_progress("Jacobian norms", samples.count, progress) as advance,
        ):
            for batch in samples:
                parts.append(of_inputs(batch, check=not parts))
                advance(len(batch[0]))
        found = _concatenated(parts)
    else:
        inputs = check_inputs(x)
        with shown_progress("Jacobian norms", len(inputs[0]), progress):
            found = of_inputs(inputs, check=True)
    return found if details else found.values


def _input_norms(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    norm: Norm,
    method: Method,
    memory: int,
    create_graph: bool,
    check: bool,
) -> JacobianNorms:
    """`jacobian_norms` of checked tensors; `check` that autograd's derivatives are the model's."""
    fusable = method == "auto" and norm == 2 and len(inputs) == 1
    if fusable and not create_graph:
        known = _known_chain_norms(module, inputs[0])
        if known is not None:
            return JacobianNorms(known, "fused")
    with model_function(module, inputs, create_graph=create_graph) as problem:
        if create_graph:
            if check:
                require_autograd(problem, module, inputs)
            with other_precision(module, inputs, problem) as other:
                values = differentiable_values(problem, norm, method, memory, other)
            return JacobianNorms(values, method)
        x, plan, traced = problem.x, None, False
        if method == "fused":
            plan = trace(module, x[:2])
        elif fusable and is_small(problem.outputs, x[0].numel()):
            plan = cached_plan(module, x[:2])
            traced = plan is not None
            if plan is not None and fused_chain(plan, 2, x.device) is None:
                plan = None
        if plan is not None:
            entry = resolve(plan, module.state_dict())
            values = plan_jacobian_norms(plan, [entry], x, norm=norm, method="fused")[0]
            return JacobianNorms(values, "fused")
        if check:
            require_autograd(problem, module, inputs, traced=traced)
        return function_jacobian_norms(problem, norm=norm, method=method, memory=memory)


def _concatenated(parts: Sequence[JacobianNorms]) -> JacobianNorms:
    """The norms of several batches in their order."""

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if any(value is None for value in found) else torch.cat(found)

    values = torch.cat([part.values for part in parts])
    return JacobianNorms(values, parts[0].method, joined("residuals"), joined("passes"))


def _known_chain_norms(module: nn.Module, x: Tensor) -> Tensor | None:
    """By the fused op, for a module whose plan is known: it is evaluated once, and checked once.

    Small calls spend more time in a second evaluation and check than in the op.
    """
    if not is_known(module):
        return None
    with lock_of(module):
        buffers = dict(module.named_buffers())
        state = {**dict(module.named_parameters()), **buffers}
        check_state(state, x, masks=buffers.keys())
        with torch.inference_mode(False):
            samples = ordinary(x).to(state_dtype(list(state.values()), [x]))
            plan = known_plan(module, samples)
            chain = None if plan is None or plan.computed else fused_chain(plan, 2, x.device)
            if plan is None or chain is None:
                return None
            tensors = entries_of(module.state_dict(), plan.parameters, plan.aliases)
            return chain_norms(plan, chain, [tensors], samples)[0]
