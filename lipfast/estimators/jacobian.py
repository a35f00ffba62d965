"""Per-sample norms of the input-output Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lipfast.errors import ArgumentError, NonFiniteError, TraceError, UnsupportedOpError
from lipfast.ops.chain_jacobian_norms import Activation, Linear, Stage, chain_jacobian_norms
from lipfast.ops.jacobian_reduction import jacobian_reduction
from lipfast.plan.graph import Reference
from lipfast.plan.interpret import evaluate
from lipfast.plan.plan import Plan
from lipfast.plan.trace import check_floating_input, evaluation_mode, unwrap
from lipfast.rules.registry import Norm, check_norm

Method = Literal["auto", "chain", "autograd"]
_RESHAPES = frozenset({"aten.flatten", "aten.view", "aten.reshape", "aten._unsafe_view"})


@dataclass(frozen=True)
class Chain:
    """Affine maps and piecewise-linear activations with one kink at 0.

    Attributes:
        weights: names of the weights, first layer first.
        biases: names of the biases, None where there is none.
        slopes: slope of the activation after each layer for negative input; 1 for none.
    """

    weights: tuple[str, ...]
    biases: tuple[str | None, ...]
    slopes: tuple[float, ...]


def find_chain(plan: Plan) -> Chain | None:
    """Read the plan as a chain of linear layers with ReLU, LeakyReLU or nothing, if it is one."""
    graph = plan.graph
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        return None
    weights: list[str] = []
    biases: list[str | None] = []
    slopes: list[float] = []
    previous = graph.nodes[0]
    for node in graph.nodes[1:]:
        source = node.args[0] if node.args else None
        if source != Reference("node", previous.name):
            return None
        previous = node
        if node.op == "aten.linear" and len(node.shape) == 1:
            weight, bias = node.args[1], node.argument(2, "bias")
            assert isinstance(weight, Reference)
            weights.append(weight.name)
            biases.append(bias.name if isinstance(bias, Reference) else None)
            slopes.append(1.0)
        elif node.op in ("aten.relu", "aten.leaky_relu") and slopes:
            slope = 0.0 if node.op == "aten.relu" else node.number(1, "negative_slope", 0.01)
            # Slopes of activations in a row multiply as long as the sign is kept.
            if slopes[-1] < 0.0:
                return None
            slopes[-1] *= slope
        elif node.op not in _RESHAPES or len(node.shape) != 1:
            return None
    if not weights or graph.outputs != (previous.name,):
        return None
    return Chain(tuple(weights), tuple(biases), tuple(slopes))


def compute_dtype(tensors: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> torch.dtype:
    """float64 if any parameter is, else float32."""
    wide = any(entry[name].dtype == torch.float64 for entry in tensors for name in names)
    return torch.float64 if wide else torch.float32


def check_samples(x: object, shape: tuple[int, ...] | None) -> Tensor:
    """Check samples (B, *shape): floating, finite, at least one.

    Raises:
        ArgumentError: not a tensor, not floating, of the wrong shape, or empty.
        NonFiniteError: a sample holds NaN or Inf; says which.
    """
    if not isinstance(x, Tensor):
        raise ArgumentError(
            f"samples must be a tensor, not {type(x).__name__} (torch.from_numpy for an array)"
        )
    check_floating_input(x)
    if (shape is not None and tuple(x.shape[1:]) != shape) or x.dim() == 0:
        wanted = ", ".join(["samples", *(str(size) for size in shape or ())])
        raise ArgumentError(
            f"samples have shape {tuple(x.shape)}; expected ({wanted}): the first dimension is the "
            "sample, the others are what the architecture was traced with"
        )
    if x.shape[0] == 0:
        raise ArgumentError("there are no samples: the first dimension of the data is 0")
    if x.is_meta:
        raise ArgumentError("the samples hold no data (device meta): give real ones")
    if not bool(torch.isfinite(x).all()):
        finite = torch.isfinite(x.reshape(x.shape[0], -1)).all(1)
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{len(bad)} of {x.shape[0]} samples hold NaN or Inf; the first is sample {bad[0]}"
        )
    return x.detach()


def plan_jacobian_norms(
    plan: Plan,
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
        x: samples (B, D...).
        norm: 1, 2 or inf.
        dtype: float32 or float64; by default that of the parameters.
        method: ``chain`` (fused native op), ``autograd``, or whichever fits.
        memory: bytes that explicit Jacobians may take.

    Returns:
        (networks, B) in `dtype`.

    Raises:
        ArgumentError: `method` is ``chain`` and the plan is not one.
    """
    dtype = dtype or compute_dtype(tensors, plan.used_parameters)
    x = x.to(dtype)
    chain = None if method == "autograd" or norm != 2 else find_chain(plan)
    if chain is not None:
        return _chain_norms(chain, tensors, x.reshape(x.shape[0], -1))
    if method == "chain":
        raise ArgumentError(
            "method='chain' needs linear layers with ReLU or LeakyReLU and norm=2; use 'auto'"
        )
    return torch.stack([_interpreted_norms(plan, entry, x, norm, memory) for entry in tensors])


def _chain_norms(chain: Chain, tensors: Sequence[Mapping[str, Tensor]], x: Tensor) -> Tensor:
    def typed(tensor: Tensor) -> Tensor:
        return tensor.detach().to(x.dtype).contiguous()

    weights = [[typed(entry[name]) for name in chain.weights] for entry in tensors]
    biases = [
        [None if name is None else typed(entry[name]) for name in chain.biases] for entry in tensors
    ]
    stages: list[Stage] = []
    for slope in chain.slopes:
        stages.append(Linear())
        if slope != 1.0:
            stages.append(Activation("leaky_relu", (slope,)))
    spectral, _ = chain_jacobian_norms(x.contiguous(), weights, biases, stages)
    return spectral


def _interpreted_norms(
    plan: Plan, parameters: Mapping[str, Tensor], x: Tensor, norm: Norm, memory: int
) -> Tensor:
    def function(samples: Tensor) -> Tensor:
        return evaluate(plan.graph, stacked, plan.constants, [samples.unsqueeze(0)])[0]

    with torch.inference_mode(False):
        stacked = {
            name: _ordinary(parameters[name]).to(x.dtype).unsqueeze(0)
            for name in plan.used_parameters
        }
        return function_jacobian_norms(function, x, norm=norm, memory=memory)


def _ordinary(tensor: Tensor) -> Tensor:
    """Detach; autograd cannot record tensors that were made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def function_jacobian_norms(
    function: Callable[[Tensor], Tensor], x: Tensor, *, norm: Norm, memory: int
) -> Tensor:
    """Norms of the Jacobian of a function that treats samples apart, (B, D...) -> (B, K)."""
    blocks = [matrix_norms(block, norm) for block in explicit_jacobians(function, x, memory)]
    return torch.cat(blocks)


def matrix_norms(matrices: Tensor, norm: Norm) -> Tensor:
    """Operator norms of (B, K, D): largest singular value, column sum (1) or row sum (inf)."""
    if norm == 2:
        return jacobian_reduction(matrices)[0]
    summed = 1 if norm == 1 else 2
    return matrices.abs().sum(summed).amax(1)


def explicit_jacobians(
    function: Callable[[Tensor], Tensor], x: Tensor, memory: int
) -> Iterator[Tensor]:
    """Jacobians (b, K, D) of blocks of samples that fit the memory budget.

    Rows come from one forward pass and a vector-Jacobian product with each unit vector, all at
    once; functions that `torch.vmap` cannot batch take one backward pass per row.
    """
    with torch.inference_mode(False), torch.no_grad():
        rows = function(x[:1].clone()).shape[-1]
    per_sample = x[0].numel() * rows * x.element_size()
    # A backward pass over hidden layers holds several arrays of this size at once.
    block = max(1, int(memory // max(1, 8 * per_sample)))
    for start in range(0, x.shape[0], block):
        with torch.inference_mode(False), torch.enable_grad():
            yield _rows_by_vjp(function, x[start : start + block].clone(), rows)


def _rows_by_vjp(function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    samples = x.shape[0]
    x = x.detach().requires_grad_()
    output = function(x)
    if not output.requires_grad:  # a constant function
        return x.new_zeros(samples, rows, x[0].numel())
    unit = torch.eye(rows, dtype=x.dtype, device=x.device)
    cotangents = unit.unsqueeze(1).expand(rows, samples, rows)
    try:
        (jacobian,) = torch.autograd.grad(
            output, x, cotangents, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
    except RuntimeError:
        pieces = [torch.autograd.grad(output, x, row, retain_graph=True)[0] for row in cotangents]
        jacobian = torch.stack(pieces)
    return jacobian.detach().reshape(rows, samples, -1).transpose(0, 1).contiguous()


def jacobian_norms(
    model: nn.Module,
    x: Tensor,
    *,
    norm: Norm = 2,
    method: Method = "auto",
    memory: int = 1 << 30,
) -> Tensor:
    """Norm of the input-output Jacobian of a model at every sample, ``||d f / d x (x_b)||``.

    Evaluated in eval mode; the model is left as it was found. All outputs together are one vector,
    all dimensions of a sample together are another. Each value is a lower estimate of the
    Lipschitz constant wherever the model is differentiable; it is not certified (rounding; at a
    kink autograd's value need not be a derivative).

    Args:
        model: a module that treats the samples of a batch apart.
        x: samples (B, D...), floating.
        norm: 1 (largest absolute column sum), 2 (largest singular value) or inf (row sum).
        method: ``chain`` for the fused op (chains of linear layers and ReLU or LeakyReLU),
            ``autograd`` for explicit Jacobians, ``auto`` for whichever fits.
        memory: bytes that explicit Jacobians may take.

    Returns:
        (B,), float64 for a float64 model, else float32.

    Raises:
        ArgumentError: the samples have the wrong shape or dtype, or the output is not floating.
        NonFiniteError: a sample holds NaN or Inf.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> lipfast.jacobian_norms(model, torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]))
        tensor([3., 4., 0.])
    """
    norm = check_norm(norm)
    x = check_samples(x, None)
    if method not in ("auto", "chain", "autograd"):
        raise ArgumentError(f"method must be 'auto', 'chain' or 'autograd', not {method!r}")
    module = unwrap(model)
    if method == "chain" or (method == "auto" and norm == 2):
        try:
            plan = Plan.trace(module, x[:2])
            if method == "chain" or find_chain(plan) is not None:
                entry = plan.resolve(module.state_dict())
                return plan_jacobian_norms(plan, [entry], x, norm=norm, method="chain")[0]
        except (TraceError, UnsupportedOpError):
            if method == "chain":
                raise
    return _module_norms(module, x, norm, memory)


def _module_norms(module: nn.Module, x: Tensor, norm: Norm, memory: int) -> Tensor:
    state = {
        **dict(module.named_parameters()),
        **dict(module.named_buffers()),
    }
    floating = [value.dtype for value in state.values() if value.dtype.is_floating_point]
    dtype = torch.float64 if torch.float64 in floating or not floating else torch.float32
    dtype = x.dtype if not floating and x.dtype == torch.float32 else dtype

    def function(samples: Tensor) -> Tensor:
        return _flat_outputs(torch.func.functional_call(module, copies, (samples,)), samples)

    with torch.inference_mode(False), evaluation_mode(module):
        # Copies: a module may write to its buffers.
        copies: dict[str, Tensor] = {
            name: value.detach().clone().to(dtype if value.dtype.is_floating_point else value.dtype)
            for name, value in state.items()
        }
        return function_jacobian_norms(function, x.to(dtype), norm=norm, memory=memory)


def _flat_outputs(outputs: Any, samples: Tensor) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not leaves:
        raise ArgumentError("the model returns no tensor")
    for leaf in leaves:
        if not leaf.dtype.is_floating_point:
            raise ArgumentError(
                f"the model returns dtype {leaf.dtype}: only floating outputs have a Jacobian"
            )
        if leaf.dim() == 0 or leaf.shape[0] != samples.shape[0]:
            raise ArgumentError(
                f"the model returns shape {tuple(leaf.shape)} for {samples.shape[0]} samples: "
                "the first dimension must be the samples"
            )
    return torch.cat([leaf.reshape(samples.shape[0], -1).to(samples.dtype) for leaf in leaves], 1)
