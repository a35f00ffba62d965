"""Per-sample Jacobian norms of chains of affine maps and piecewise linear activations, fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import check_floating, check_same_device, native_dtype


def chain_jacobian_norms(
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    slopes: Sequence[float],
) -> tuple[Tensor, Tensor]:
    r"""Norms of $J(x) = D_L W_L \cdots D_1 W_1$, spectral and Frobenius: N networks, B samples.

    $D_l = \mathrm{diag}(1 \text{ where } z_l > 0, s_l \text{ elsewhere})$ is the derivative of the
    activation after layer l: $s_l = 0$ for ReLU, the slope of a LeakyReLU, 1 for none. Forward
    pass, derivatives, products from the output side and reduction run for a few samples at a time;
    nothing of size B x K x n is stored, and rows of inactive units are skipped.

    Not certified: autograd's convention at kinks, in the dtype's rounding (relative error about
    1e-6 in float32, 1e-14 in float64, away from kinks).

    Args:
        x: (B, D) samples, float32 or float64.
        weights: per network, per layer: (n_out, n_in), dtype of x; all networks alike.
        biases: alike: (n_out,) or None.
        slopes: one per layer, finite.

    Returns:
        Two tensors (N, B) of x's dtype.

    Raises:
        ArgumentError: wrong types, dtypes or shapes; the message names network and layer.

    Example:
        >>> import torch
        >>> from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
        >>> hidden = torch.tensor([[3.0, 0.0], [0.0, 5.0]])
        >>> x = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # both units active; the first only
        >>> chain_jacobian_norms(x, [[hidden, torch.eye(2)]], [[None, None]], [0.0, 1.0])[0]
        tensor([[5., 3.]])
    """
    x = native_dtype(check_floating(x, "x", 2))
    if len(weights) == 0 or len(weights) != len(biases):
        raise ArgumentError(f"{len(weights)} networks' weights and {len(biases)} networks' biases")
    depth = len(slopes)
    none = x.new_empty(0)
    flat_weights, flat_biases = [], []
    for network, (network_weights, network_biases) in enumerate(zip(weights, biases, strict=True)):
        if len(network_weights) != depth or len(network_biases) != depth:
            raise ArgumentError(
                f"network {network}: {len(network_weights)} weights, {len(network_biases)} biases, "
                f"{depth} slopes"
            )
        width = x.shape[1]
        for layer, (weight, bias) in enumerate(zip(network_weights, network_biases, strict=True)):
            name = f"network {network}, layer {layer}"
            if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
                raise ArgumentError(
                    f"{name}: weights must have the dtype of x, {x.dtype}, got {weight.dtype}"
                )
            for tensor in (weight,) if bias is None else (weight, bias):
                check_same_device(tensor, x, name)
            if weight.dim() != 2 or weight.shape[1] != width:
                raise ArgumentError(
                    f"{name}: expected a weight (n_out, {width}), got {tuple(weight.shape)}"
                )
            width = weight.shape[0]
            if bias is not None and bias.shape != (width,):
                raise ArgumentError(f"{name}: expected a bias ({width},), got {tuple(bias.shape)}")
            flat_weights.append(weight.detach().contiguous())
            flat_biases.append(none if bias is None else bias.detach().contiguous())
    spectral, frobenius = torch.ops.lipfast.chain_jacobian_norms(
        x, flat_weights, flat_biases, [float(slope) for slope in slopes]
    )
    return spectral, frobenius


@torch.library.register_fake("lipfast::chain_jacobian_norms")
def _chain_jacobian_norms_fake(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], slopes: list[float]
) -> tuple[Tensor, Tensor]:
    shape = (len(weights) // len(slopes), x.shape[0])
    return x.new_empty(shape), x.new_empty(shape)
