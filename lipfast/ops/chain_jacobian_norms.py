"""Per-sample Jacobian norms of chains of affine maps, activations and pools, fused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, check_same_device, native_dtype
from lipfast.ops.chain_stages import (
    AFFINE_KINDS,
    NUMBERS,
    Activation,
    Flatten,
    Linear,
    Stage,
    encode_chain,
    is_affine,
    output_shape,
)
from lipfast.ops.threads import native_op

_MOST_LAYERS_ON_CUDA = 64
MAX_OUTPUTS = 1024
"""Most rows K of a Jacobian: every thread holds a few of K x the largest layer."""


def chain_jacobian_norms(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    r"""Norms of $J(x) = J_S \cdots J_1$, spectral and Frobenius: N networks, B samples.

    $J_s$ is the Jacobian of stage s where the sample meets it: the weight of a linear layer or of a
    convolution, the diagonal of an activation's derivatives, the selection that a max pool makes.
    Forward pass, derivatives, products from the output side and reduction run for a few samples at
    a time; nothing of size B x K x n is stored, and units with derivative zero are skipped, as are
    those that a max pool passes over.

    Not certified: autograd's convention at kinks, in the dtype's rounding (relative error about
    1e-6 in float32, 1e-14 in float64, away from kinks).

    Args:
        x: (B, *shape) samples, float32 or float64: (B, n), (B, channels, length) or
            (B, channels, height, width).
        weights: per network, one for each `Linear` and `ConvStage`, first stage first; dtype of
            x; all networks alike.
        biases: alike: (n_out,) or None.
        stages: what the chain consists of, with at least one affine map.

    Returns:
        Two tensors (N, B) of x's dtype.

    Raises:
        ArgumentError: wrong types, dtypes or shapes (the message names network and stage), or more
            than `MAX_OUTPUTS` outputs.

    Example:
        >>> import torch
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> hidden = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # both units active; the first only
        >>> stages = [Linear(), Activation("relu"), Linear()]
        >>> chain_jacobian_norms(x, [[hidden, torch.eye(2)]], [[None, None]], stages)[0]
        tensor([[5., 3.]])
    """
    x = _checked_samples(x)
    if len(weights) == 0 or len(weights) != len(biases):
        raise ArgumentError(f"{len(weights)} networks' weights and {len(biases)} networks' biases")
    affine = _count_of_maps(stages)
    none = x.new_empty(0)
    flat_weights, flat_biases = [], []
    kinds: list[Any] | None = None
    for network, (network_weights, network_biases) in enumerate(zip(weights, biases, strict=True)):
        if len(network_weights) != affine or len(network_biases) != affine:
            raise ArgumentError(
                f"network {network}: {len(network_weights)} weights, {len(network_biases)} biases, "
                f"{affine} Linear and ConvStage stages"
            )
        own = _kinds_of_tensors((*network_weights, *network_biases))
        if own is None or own != kinds:  # what is like the network before passed its checks
            _check_network(f"network {network}", x, network_weights, network_biases, stages)
            kinds = own
        flat_weights += [_as_planes(_as_op_reads(weight)) for weight in network_weights]
        flat_biases += [none if bias is None else _as_op_reads(bias) for bias in network_biases]
    return _native_norms(x, flat_weights, flat_biases, stages, weights[0])


def chain_jacobian_norms_together(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
) -> tuple[Tensor, Tensor]:
    """`chain_jacobian_norms` of networks whose parameters lie together: one look at all of them.

    Args:
        x: as there.
        weights: (N, *shape) for each `Linear` and `ConvStage`, first stage first.
        biases: (N, n_out) each, or None.
        stages: as there.

    Raises:
        ArgumentError: as there.
    """
    x = _checked_samples(x)
    counts = {len(tensor) for tensor in (*weights, *biases) if tensor is not None}
    affine = _count_of_maps(stages)
    if len(counts) != 1 or counts == {0} or not affine == len(weights) == len(biases):
        raise ArgumentError(
            f"{len(weights)} weights and {len(biases)} biases of {sorted(counts)} networks, for "
            f"{affine} Linear and ConvStage stages"
        )
    first = [None if bias is None else bias[0] for bias in biases]
    _check_network("network 0", x, [weight[0] for weight in weights], first, stages)
    nones = [x.new_empty(0)] * counts.pop()
    columns = [_as_op_reads(weight).unbind() for weight in weights]
    shifts = [nones if bias is None else _as_op_reads(bias).unbind() for bias in biases]
    planes = [
        [_as_planes(own) for own in column] if column[0].dim() == 3 else column
        for column in columns
    ]
    flat_weights = list(chain.from_iterable(zip(*planes, strict=True)))
    flat_biases = list(chain.from_iterable(zip(*shifts, strict=True)))
    return _native_norms(x, flat_weights, flat_biases, stages, [weight[0] for weight in weights])


def _checked_samples(x: Tensor) -> Tensor:
    x = native_dtype(check_floating(x, "x").detach())
    if x.dim() < 2:
        raise ArgumentError(f"x: expected samples (B, *shape), got shape {tuple(x.shape)}")
    return x


def _count_of_maps(stages: Sequence[Stage]) -> int:
    affine = sum(is_affine(stage) for stage in stages)
    if affine == 0:
        raise ArgumentError("a chain needs at least one Linear or ConvStage")
    return affine


def _native_norms(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    stages: Sequence[Stage],
    first: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Call the native op with the parameters of all networks, one after the other."""
    if not has_chain_kernel(stages, x.device):
        raise ArgumentError(
            f"on {x.device} a chain is up to {_MOST_LAYERS_ON_CUDA} linear stages with activations "
            "after them: use the CPU, or explicit Jacobians (method='rows')"
        )
    numbers, parameters = encode_chain(stages, [tuple(weight.shape) for weight in first])
    with native_op():
        spectral, frobenius = torch.ops.lipfast.chain_jacobian_norms(
            _as_planes(x), weights, biases, numbers, parameters
        )
    return spectral, frobenius


def _kinds_of_tensors(tensors: Iterable[object]) -> list[Any] | None:
    """What is checked of the tensors of a network; None where one is none."""
    found: list[Any] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif isinstance(tensor, Tensor):
            found.append((tensor.dtype, tensor.shape, tensor.device))
        else:
            return None
    return found


def _as_op_reads(tensor: Tensor) -> Tensor:
    """Without gradients, contiguous: most are so already, which is quick to see."""
    if tensor.requires_grad or not tensor.is_contiguous():
        return tensor.detach().contiguous()
    return tensor


def _check_network(
    network: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stages: Sequence[Stage],
) -> None:
    shape = tuple(x.shape[1:])
    affine = zip(weights, biases, strict=True)
    for index, stage in enumerate(stages):
        name = f"{network}, stage {index}"
        weight, bias = next(affine) if is_affine(stage) else (None, None)
        for tensor in (weight, bias):
            if tensor is not None and tensor.dtype != x.dtype:
                raise ArgumentError(
                    f"{name}: weights must have the dtype of x, {x.dtype}, got {tensor.dtype}"
                )
            if tensor is not None:
                check_same_device(tensor, x, name)
        try:
            shape = output_shape(stage, shape, None if weight is None else tuple(weight.shape))
        except ArgumentError as error:
            raise ArgumentError(f"{name}: {error}") from None
        if bias is not None and bias.shape != shape[:1]:
            raise ArgumentError(f"{name}: expected a bias ({shape[0]},), got {tuple(bias.shape)}")
    if math.prod(shape) > MAX_OUTPUTS:
        raise ArgumentError(
            f"{math.prod(shape)} outputs are more than the {MAX_OUTPUTS} that are formed row by row"
        )


def has_chain_kernel(stages: Sequence[Stage], device: torch.device) -> bool:
    """Whether `chain_jacobian_norms` takes a chain on a device.

    The CPU takes every chain; CUDA takes up to 64 linear stages and 64 activations after them, and
    Flatten before the first.

    Example:
        >>> from lipfast.ops.chain_stages import Activation, Linear
        >>> has_chain_kernel([Linear(), Activation("tanh")], torch.device("cpu"))
        True
        >>> has_chain_kernel([Activation("tanh"), Linear()], torch.device("cuda"))
        False
    """
    if device.type == "cpu":
        return True
    linear, activations = 0, 0
    for stage in stages:
        linear += isinstance(stage, Linear)
        activations += isinstance(stage, Activation)
        if not (isinstance(stage, Linear | Flatten) or (isinstance(stage, Activation) and linear)):
            return False
    return 1 <= linear <= _MOST_LAYERS_ON_CUDA and activations <= _MOST_LAYERS_ON_CUDA


def _as_planes(tensor: Tensor) -> Tensor:
    """A kernel or samples with one axis, (n, channels, length), with a height of 1."""
    return tensor.unsqueeze(2) if tensor.dim() == 3 else tensor


@torch.library.register_fake("lipfast::chain_jacobian_norms")
def _chain_jacobian_norms_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], stages: list[int], *_: object
) -> tuple[Tensor, Tensor]:
    affine = sum(kind in AFFINE_KINDS for kind in stages[::NUMBERS])
    shape = (len(weights) // affine, x.shape[0])
    return x.new_empty(shape), x.new_empty(shape)
