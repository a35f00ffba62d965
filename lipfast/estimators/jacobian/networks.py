"""Norms of the Jacobians of networks of a plan, natively or through torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import SampleFunction, ordinary, separate_inputs
from lipfast.estimators.jacobian.linearization import is_small
from lipfast.estimators.jacobian.methods import Method, function_jacobian_norms
from lipfast.norms import Norm
from lipfast.ops.chain_jacobian_norms import (
    chain_jacobian_norms,
    chain_jacobian_norms_together,
    has_chain_kernel,
)
from lipfast.plan.architecture import Architecture
from lipfast.plan.chain import Chain
from lipfast.plan.interpret import evaluate
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import floating_as, stack


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

    Of networks on a device this looks at what it finds, network by network: see `plan_norms_later`.

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
        NonFiniteError: a BatchNorm cannot be folded.
    """
    dtype = dtype or compute_dtype(tensors, plan.stored_parameters)
    x = x.to(dtype)
    chain = fused_chain(plan, norm, x.device) if method == "auto" else None
    if method == "fused" and norm == 2:
        chain = plan.chain
    if chain is not None:
        return chain_norms(plan, chain, tensors, x)
    if method == "fused":
        raise ArgumentError(
            "method='fused' needs a chain of linear layers, convolutions, pools and activations, "
            "and norm=2; use 'auto'"
        )
    with torch.inference_mode(False):
        return torch.stack(
            [
                function_jacobian_norms(
                    interpreted(plan, [entry], x[None]), norm=norm, method=method, memory=memory
                ).values
                for entry in tensors
            ]
        )


def fused_chain(plan: Architecture, norm: Norm, device: torch.device) -> Chain | None:
    """The chain that the native op takes, if there is one and nothing else is faster."""
    if norm != 2 or not is_small(*plan.jacobian_shape):
        return None
    chain = plan.chain
    return chain if chain is not None and has_chain_kernel(chain.stages, device) else None


def chain_norms(
    plan: Architecture,
    chain: Chain,
    tensors: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    checks: list[Tensor] | None = None,
) -> Tensor:
    """`plan_jacobian_norms` by the native op, of samples in the dtype of the computation."""
    x = x.contiguous()
    if isinstance(tensors, ResolvedNetworks):
        together = chain.parameters_together(tensors, plan.constants, x.dtype, checks)
        if together is not None:
            return chain_jacobian_norms_together(x, *together, chain.stages)[0]
    weights, biases = chain.parameters_of(tensors, plan.constants, x.dtype)
    spectral, _ = chain_jacobian_norms(x, weights, biases, chain.stages)
    return spectral


def interpreted(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    checks: list[Tensor] | None = None,
) -> SampleFunction:
    """All networks, each on its samples (networks or 1, B, D...): those of the first come first."""

    def function(samples: Tensor) -> Tensor:
        inputs = separate_inputs(samples, plan.input_shapes)
        stacks = [value.reshape(len(tensors), -1, *value.shape[1:]) for value in inputs]
        return evaluate(plan.graph, stacked, plan.constants, stacks).flatten(0, 1)

    if len(tensors) == 1:  # without a copy
        parameters = {name: tensors[0][name].unsqueeze(0) for name in plan.used_parameters}
    else:
        parameters = stack(tensors, plan.used_parameters, x.dtype)
    stacked = {name: floating_as(ordinary(own), x.dtype) for name, own in parameters.items()}
    outputs, _ = plan.jacobian_shape
    samples = ordinary(x).expand(len(tensors), *x.shape[1:]).flatten(0, 1)
    return SampleFunction(function, samples, outputs, tuple(stacked.values()), checks)
