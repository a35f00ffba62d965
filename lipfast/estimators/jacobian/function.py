"""A model as a function of one tensor, (B, D...) -> (B, K), in which samples stay apart."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lipfast.errors import ArgumentError, LipfastError
from lipfast.estimators.jacobian.held import HeldState
from lipfast.ops.restoring import Modes, Restoring
from lipfast.plan.export import exported_module
from lipfast.plan.kept_values import strided_parts
from lipfast.plan.modules import evaluation_mode, lock_of, require_floating_modules, unwrap
from lipfast.plan.outputs import returned_tensors
from lipfast.plan.state import require_finite
from lipfast.plan.trace import Source, require_module
from lipfast.text import kind_and_first_line

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SampleFunction:
    """What is differentiated.

    Attributes:
        function: (B, D...) -> (B, K); sample b of the result depends on sample b only.
        x: the samples in the dtype of the computation; several inputs are flattened and joined.
        outputs: K.
        constants: tensors that the function holds (parameters), which take no memory per sample.
        checks: where there is a list, truth values that its derivatives rest on are put there, to
            be looked at later.
    """

    function: Function
    x: Tensor
    outputs: int
    constants: tuple[Tensor, ...] = ()
    checks: list[Tensor] | None = None


@contextlib.contextmanager
def differentiating() -> Iterator[None]:
    """Autograd as derivatives of derivatives need it, whatever mode the caller is in.

    Attention runs in torch's plain kernel, because the fused ones have no second derivative, and
    autocast is off.

    Raises:
        ArgumentError: torch cannot evaluate or differentiate what runs inside.
    """
    undo = Restoring(Modes(attention=True).restore)
    try:
        with (
            undo,
            undo,
            undo,
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    except LipfastError:
        raise
    except RuntimeError as error:  # NotImplementedError among them
        if "allocate" in str(error) or "out of memory" in str(error):
            raise
        raise ArgumentError(
            f"the model cannot be differentiated on these samples: {kind_and_first_line(error)}"
        ) from error


def module_of(model: Source) -> nn.Module:
    """The module inside a wrapper, an exported program or a ``.pt2`` file.

    Raises:
        ArgumentError: something else.
        TraceError: the program cannot be read, or was exported in training mode.
    """
    if isinstance(model, (str, os.PathLike, ExportedProgram)):
        return exported_module(model)
    return unwrap(require_module(model))


@contextlib.contextmanager
def model_function(
    module: nn.Module,
    inputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    dtype: torch.dtype | None = None,
) -> Iterator[SampleFunction]:
    """The module in eval mode as a function of its samples; afterwards it is as it was found.

    Parameters enter as constants without gradients, unless `create_graph`; buffers are copies,
    because a module may write to them. Half precision is computed in float32.

    Args:
        module: treats the samples of a batch apart.
        inputs: checked, one per input of the module.
        create_graph: use the module's own parameters and the inputs' own graph.
        dtype: of the computation; by default float64 for a float64 model, else float32.

    Raises:
        ArgumentError: module and inputs are on different devices, or the module cannot be
            evaluated on them.
        NonFiniteError: a parameter holds NaN or Inf.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentError("TorchScript modules are not supported: give the original nn.Module")
    with lock_of(module):
        parameters = dict(module.named_parameters())
        buffers = dict(module.named_buffers())
    require_floating_modules(module)
    check_state({**parameters, **buffers}, inputs[0], masks=buffers.keys())
    dtype = dtype or state_dtype([*parameters.values(), *buffers.values()], inputs)
    shapes = [tuple(value.shape[1:]) for value in inputs]

    def typed(value: Tensor) -> Tensor:
        return value.to(dtype) if value.dtype.is_floating_point else value

    def entry(name: str, copies: bool) -> Tensor:
        if name in buffers:
            return typed(buffers[name].detach().clone())
        found = parameters[name]
        value = typed(found if create_graph else ordinary(found))
        return value.clone() if copies else value

    def state(copies: bool, only: str | None) -> dict[str, Tensor]:
        names = (*parameters, *buffers) if only is None else (only,)
        return {name: entry(name, copies) for name in names}

    def evaluate(samples: Tensor, state: dict[str, Tensor]) -> Tensor:
        samples = samples.clone()  # a module may write into its input
        outputs = torch.func.functional_call(module, state, separate_inputs(samples, shapes))
        return flat_outputs(outputs, samples)

    with torch.inference_mode(False), evaluation_mode(module) as kept:
        held = HeldState(kept, state, parameters)

        def function(samples: Tensor) -> Tensor:
            return evaluate(samples, held())

        x = joined_inputs([value if create_graph else ordinary(value) for value in inputs], dtype)
        outputs = _count_outputs(function, x, module, shapes)
        held.settle(evaluate, x.detach())
        yield SampleFunction(function, x, outputs, held.constants)


def joined_inputs(inputs: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One input as it is, several flattened per sample and joined."""
    values = [value.to(dtype) for value in inputs]
    return values[0] if len(values) == 1 else torch.cat([v.reshape(len(v), -1) for v in values], 1)


def separate_inputs(samples: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """What `joined_inputs` joined."""
    if len(shapes) == 1:
        return (samples,)
    sizes = [int(torch.Size(shape).numel()) for shape in shapes]
    pieces = torch.split(samples, sizes, dim=1)
    return tuple(
        piece.reshape(len(samples), *shape) for piece, shape in zip(pieces, shapes, strict=True)
    )


def ordinary(tensor: Tensor) -> Tensor:
    """Detach; autograd cannot record tensors that were made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def check_state(state: Mapping[str, Tensor], x: Tensor, masks: Collection[str] = ()) -> None:
    """Check that parameters and buffers hold finite numbers on the samples' device.

    `masks`, which may also hold -inf, are the buffers where it is not known what they are used for.

    Raises:
        ArgumentError: one is on another device, or not initialised.
        NonFiniteError: one holds NaN or Inf.
    """
    for name, value in state.items():
        if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
            raise ArgumentError(f"parameter '{name}' is not initialised: call the model once first")
        if not value.is_meta and value.device != x.device:
            raise ArgumentError(
                f"parameter '{name}' is on {value.device} and the samples are on {x.device}: move "
                f"the samples (x.to({str(value.device)!r})) or the model"
            )
    floating = {
        name: value if value.layout is torch.strided else strided_parts(value)[-1]
        for name, value in state.items()
        if value.is_floating_point()
    }
    require_finite(floating, floating, masks=masks)


def state_dtype(state: Sequence[Tensor], inputs: Sequence[Tensor]) -> torch.dtype:
    """float64 if the model is, or if it has no parameters and the samples are; else float32."""
    floating = [value.dtype for value in state if value.dtype.is_floating_point]
    deciding = floating or [value.dtype for value in inputs]
    return torch.float64 if torch.float64 in deciding else torch.float32


def _count_outputs(
    function: Function, x: Tensor, module: nn.Module, shapes: Sequence[tuple[int, ...]]
) -> int:
    """K, from two samples; what goes wrong there is an error in the caller's terms."""
    try:
        try:
            with torch.no_grad():
                return function(x[:2]).shape[1]
        except RuntimeError:  # a derivative inside forward may need autograd
            with torch.enable_grad():
                return function(x[:2].detach().requires_grad_()).shape[1]
    except LipfastError:
        raise
    except Exception as error:  # user code runs here: anything may come out
        lines = str(error).strip().splitlines() or [""]
        shown, several = ", ".join(str(shape) for shape in shapes), len(shapes) > 1
        raise ArgumentError(
            f"{type(module).__name__} cannot be evaluated on samples of shape {shown} in "
            f"{x.dtype}: {type(error).__name__}: {lines[0]}. The first dimension of the data is "
            "the sample, the others are what the model takes; several inputs go in a tuple"
            + (f", as these {len(shapes)} do (torch.stack for a list of samples)." * several or ".")
        ) from error


def flat_outputs(outputs: Any, samples: Tensor) -> Tensor:
    """All output tensors, flattened per sample and joined: (B, K).

    Raises:
        ArgumentError: there is none, one is not floating, or its first dimension is not B.
    """
    leaves = list(returned_tensors(outputs))
    if not leaves:
        raise ArgumentError("the model returns no tensor")
    for leaf in leaves:
        if not leaf.dtype.is_floating_point:
            what = "torch.view_as_real of them" if leaf.is_complex() else "the others"
            raise ArgumentError(
                f"the model returns dtype {leaf.dtype}: only floating outputs have a Jacobian; "
                f"wrap it in a module that returns {what} alone"
            )
        if leaf.dim() == 0 or leaf.shape[0] != samples.shape[0]:
            raise ArgumentError(
                f"the model returns shape {tuple(leaf.shape)} for {samples.shape[0]} samples: "
                "the first dimension must be the samples"
            )
    flat = [leaf.reshape(samples.shape[0], -1).to(samples.dtype) for leaf in leaves]
    joined = flat[0] if len(flat) == 1 else torch.cat(flat, 1)
    if joined.shape[1] == 0:
        raise ArgumentError("the model returns no numbers: its outputs are empty")
    return joined
