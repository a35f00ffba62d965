"""Per-sample norms of the input-output Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn, TypedDict, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import Unpack

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import (
    SampleFunction,
    check_state,
    differentiating,
    model_function,
    module_of,
    ordinary,
    separate_inputs,
    state_dtype,
)
from lipfast.estimators.jacobian.gradient import differentiable_values
from lipfast.estimators.jacobian.lanczos import lanczos_triplets
from lipfast.estimators.jacobian.linearization import (
    DerivativeError,
    footprint,
    is_small,
    prefers_lanczos,
)
from lipfast.estimators.jacobian.precision import other_precision
from lipfast.estimators.jacobian.rows import row_norms
from lipfast.estimators.jacobian.trust import require_autograd
from lipfast.estimators.options import check_flags, check_options, refuse
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.samples import Data, check_inputs, read_samples
from lipfast.norms import AnyNorm, Norm
from lipfast.ops.chain_jacobian_norms import (
    chain_jacobian_norms,
    chain_jacobian_norms_together,
    has_chain_kernel,
)
from lipfast.plan.architecture import Architecture
from lipfast.plan.cache import cached_plan, is_known, known_plan
from lipfast.plan.chain import Chain
from lipfast.plan.checked import resolve
from lipfast.plan.interpret import evaluate
from lipfast.plan.modules import lock_of
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import entries_of, floating_as
from lipfast.plan.trace import Source, trace

Method = Literal["auto", "fused", "rows", "lanczos"]
METHODS: tuple[str, ...] = get_args(Method)


def compute_dtype(tensors: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> torch.dtype:
    """float64 if any parameter is, else float32."""
    stacked = tensors.stacked if isinstance(tensors, ResolvedNetworks) else {}
    apart = [name for name in names if name not in stacked]
    wide = any(stacked[name].dtype == torch.float64 for name in names if name in stacked) or any(
        entry[name].dtype == torch.float64 for entry in tensors for name in apart
    )
    return torch.float64 if wide else torch.float32


def plan_jacobian_norms(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    *,
    norm: Norm = 2,
    dtype: torch.dtype | None = None,
    method: Method = "auto",
    memory: int = 1 << 30,
) -> Tensor:
    """``||J_n(x_b)||`` for networks n and samples b.

    Args:
        plan: the architecture.
        tensors: checked parameters of each network.
        x: samples (B, D...); of several inputs flattened and joined.
        norm: 1, 2 or inf.
        dtype: float32 or float64; by default that of the parameters.
        method: ``fused`` (native op for chains), ``rows``, ``lanczos``, or whichever fits.
        memory: bytes that intermediate results may take.

    Returns:
        (networks, B) in `dtype`.

    Raises:
        ArgumentError: `method` is ``fused`` and the plan is not a chain.
    """
    dtype = dtype or compute_dtype(tensors, plan.stored_parameters)
    x = x.to(dtype)
    chain = fused_chain(plan, norm, x.device) if method == "auto" else None
    if method == "fused" and norm == 2:
        chain = plan.chain
    if chain is not None:
        return _chain_norms(plan, chain, tensors, x)
    if method == "fused":
        raise ArgumentError(
            "method='fused' needs a chain of linear layers, convolutions, pools and activations, "
            "and norm=2; use 'auto'"
        )
    with torch.inference_mode(False):
        norms = [
            function_jacobian_norms(
                _interpreted(plan, entry, x), norm=norm, method=method, memory=memory
            ).values
            for entry in tensors
        ]
    return torch.stack(norms)


def fused_chain(plan: Architecture, norm: Norm, device: torch.device) -> Chain | None:
    """The chain that the native op takes, if there is one and nothing else is faster."""
    if norm != 2 or not is_small(*plan.jacobian_shape):
        return None
    chain = plan.chain
    return chain if chain is not None and has_chain_kernel(chain.stages, device) else None


def _chain_norms(
    plan: Architecture, chain: Chain, tensors: Sequence[Mapping[str, Tensor]], x: Tensor
) -> Tensor:
    x = x.contiguous()
    together = _chain_together(chain, tensors, x.dtype)
    if together is not None:
        return chain_jacobian_norms_together(x, *together, chain.stages)[0]
    weights, biases = chain.parameters_of(tensors, plan.constants, x.dtype)
    spectral, _ = chain_jacobian_norms(x, weights, biases, chain.stages)
    return spectral


def _chain_together(
    chain: Chain, tensors: Sequence[Mapping[str, Tensor]], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """Weights and biases of all networks, (N, *shape) each, where they lie together already."""
    if chain.maps or not isinstance(tensors, ResolvedNetworks):
        return None
    names = [name for name in (*chain.weights, *chain.biases) if name is not None]
    if not all(tensors.lies_together(name) for name in names):
        return None
    weights, biases = chain.parameters(tensors.tensors(names), {})
    return (
        [weight.to(dtype) for weight in weights],
        [None if bias is None else bias.to(dtype) for bias in biases],
    )


def _interpreted(plan: Architecture, parameters: Mapping[str, Tensor], x: Tensor) -> SampleFunction:
    def function(samples: Tensor) -> Tensor:
        inputs = separate_inputs(samples, plan.input_shapes)
        stacks = [value.unsqueeze(0) for value in inputs]
        return evaluate(plan.graph, stacked, plan.constants, stacks)[0]

    stacked = {
        name: floating_as(ordinary(parameters[name]), x.dtype).unsqueeze(0)
        for name in plan.used_parameters
    }
    outputs, _ = plan.jacobian_shape
    return SampleFunction(function, ordinary(x), outputs, tuple(stacked.values()))


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
        if prefers_lanczos(size, norm, method):
            try:
                found = lanczos_triplets(problem, size, memory=memory)
                return JacobianNorms(found.values, "lanczos", found.residuals, found.passes)
            except DerivativeError:
                if method == "lanczos":
                    raise
        return JacobianNorms(row_norms(problem, size, norm, memory), "rows")


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
            fused op where it can, Lanczos where K and D both exceed 64, else rows.
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
            return _chain_norms(plan, chain, [tensors], samples)[0]
