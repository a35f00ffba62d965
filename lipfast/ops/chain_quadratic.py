"""Certified Lipschitz constants of chains by quadratic constraints on their slopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops._arguments import (
    check_floating,
    check_integer,
    check_same_device,
    check_terms,
    native_dtype,
)
from lipfast.ops.interrupts import interruptible
from lipfast.ops.threads import native_op


class ChainQuadratic(NamedTuple):
    r"""Bounds of N chains, and what proves them.

    The certificate is of the scaled weights $2^{e_i[j] - e_{i-1}[k] - s_i} W_i[j, k]$, $e_0 =
    e_{h+1} = 0$, applied in one rounding: their constant is at most $\rho$, and that of the weights
    as they were given $2^{\sum s} \rho$.

    Attributes:
        log_values: (N,), float64, natural logarithms of the bounds, rounded up; inf where nothing
            was proved.
        values: (N,), float64, the bounds, rounded up; inf also where float64 does not hold them.
        squares: (N,), float64, $\rho^2$.
        multipliers: per hidden layer (N, n_i), float64, D with which $\rho$ was proved.
        logs: alike, $\log_2$ of D of the weights as they were given: $\log_2 D_i[j] - 2 e_i[j] +
            2 (s_1 + .. + s_i)$, a `start` for similar weights.
        unit_exponents: per hidden layer (N, n_i), int32, $e_i$.
        weight_exponents: (N, L), int32, $s_i$.
        evaluations: (N,), int32, sweeps of the search and of the certificate.
    """

    log_values: Tensor
    values: Tensor
    squares: Tensor
    multipliers: tuple[Tensor, ...]
    logs: tuple[Tensor, ...]
    unit_exponents: tuple[Tensor, ...]
    weight_exponents: Tensor
    evaluations: Tensor


def chain_quadratic(
    weights: Sequence[Sequence[Tensor]],
    means: Sequence[Tensor],
    products: Sequence[Tensor],
    *,
    errors: Sequence[Sequence[Tensor | None]] | None = None,
    evaluations: int = 30,
    start: Sequence[Tensor] | None = None,
) -> ChainQuadratic:
    r"""Upper bounds of $\|W_{h+1} \Sigma_h W_h \cdots \Sigma_1 W_1\|_2$ over all slopes.

    $\Sigma_i$ are diagonal, $\sigma^2 - 2 m \sigma + p \le 0$ unit by unit: of a chain of such maps
    and activations the Lipschitz constant. The linear matrix inequality of LipSDP-Neuron (Fazlyab
    et al. 2019) in another form; its multipliers are searched for in float32, the certificate is a
    Cholesky factorisation in float64 with all roundings accounted for (docs/bounds.md). Upper
    bounds, certified: never below the truth in real arithmetic, whatever was found. The search
    needs one sweep of factorisations per evaluation.

    Args:
        weights: per network L >= 2 matrices (n_i, n_{i-1}), first map first; on the CPU; all
            networks alike. Unless all are float64 or none is, they are copied to float64.
        means: m, per hidden layer (n_i,) or (N, n_i), as `boxes_of` gives it for a range of slopes.
        products: p, alike. NaN, and sizes of m and p above 2^50, prove nothing: inf.
        errors: per network and weight None or elementwise bounds (n_i, n_{i-1}), float64, of what
            the weight is off by; the bound is then of all weights within them.
        evaluations: of the search, after its start; 0 takes the start itself.
        start: per hidden layer (n_i,) or (N, n_i), `ChainQuadratic.logs` of similar weights.
            Networks for which it says nothing (NaN, far from feasible) are searched without it.

    Raises:
        ArgumentError: wrong types, dtypes, shapes or numbers (the message names which). A network
            for which nothing is proved, NaN among its weights included, is no error but inf.

    Example:
        >>> import torch
        >>> weights = [[torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, -1.0]])]]
        >>> half, zero = torch.full((2,), 0.5).double(), torch.zeros(2).double()
        >>> found = chain_quadratic(weights, [half], [zero])  # ReLU: slopes in [0, 1]
        >>> 4.0 <= found.values.item() < 4.1  # one unit alone; the product of norms is 7.07
        True
    """
    layers, flat = _flat_weights(weights)
    networks = len(weights)
    units = [weight.shape[0] for weight in flat[: layers - 1]]
    check_integer("evaluations", evaluations, 0, 31)
    bounds = _flat_errors(errors, flat, layers)
    arguments = [
        _of_units(tensors, name, units, networks)
        for tensors, name in ((means, "means"), (products, "products"), (start or (), "start"))
        if tensors or name != "start"
    ]
    arguments += [[]] * (3 - len(arguments))
    with native_op(), interruptible():
        found = torch.ops.lipfast.chain_quadratic(flat, bounds, *arguments, layers, evaluations)
    numbers, evaluated, multipliers, logs, unit_exponents, weight_exponents = found
    return ChainQuadratic(
        numbers[:, 0],
        numbers[:, 1],
        numbers[:, 2],
        multipliers.split(units, 1),
        logs.split(units, 1),
        unit_exponents.split(units, 1),
        weight_exponents,
        evaluated[:, 0],
    )


def _flat_weights(weights: Sequence[Sequence[Tensor]]) -> tuple[int, list[Tensor]]:
    """How many maps a network has, and the weights of all networks as the kernel reads them."""
    if len(weights) == 0 or len(weights[0]) < 2:
        raise ArgumentError("weights: expected at least one network of at least two matrices")
    layers, flat = len(weights[0]), []
    like = check_floating(weights[0][0], "network 0, weight 0", 2)
    if like.device.type != "cpu":
        raise ArgumentError(f"weights: are on {like.device}; this op is for the CPU (tensor.cpu())")
    for network, own in enumerate(weights):
        if len(own) != layers:
            raise ArgumentError(f"network {network}: {len(own)} weights, expected {layers}")
        columns = like.shape[1]
        for index, weight in enumerate(own):
            name = f"network {network}, weight {index}"
            check_same_device(check_floating(weight, name, 2), like, name)
            shape = (weights[0][index].shape[0], columns)
            if tuple(weight.shape) != shape or weight.numel() == 0:
                raise ArgumentError(f"{name}: expected shape {shape}, got {tuple(weight.shape)}")
            check_terms(max(shape), name)
            flat.append(native_dtype(weight.detach()))
            columns = shape[0]
    if len({weight.dtype for weight in flat}) > 1:
        flat = [weight.double() for weight in flat]
    return layers, flat


def _flat_errors(
    errors: Sequence[Sequence[Tensor | None]] | None, weights: Sequence[Tensor], layers: int
) -> list[Tensor]:
    """Bounds of the weights' errors, network by network, empty where there is none."""
    if errors is None:
        return []
    own = [bound for network in errors for bound in network]
    if len(own) != len(weights) or any(len(network) != layers for network in errors):
        raise ArgumentError(f"errors: {len(own)} for {len(weights)} weights")
    flat = []
    for index, (bound, weight) in enumerate(zip(own, weights, strict=True)):
        name = f"network {index // layers}, error {index % layers}"
        if bound is None:
            flat.append(torch.empty(0, dtype=torch.float64))
            continue
        check_same_device(check_floating(bound, name, 2), weight, name)
        if bound.shape != weight.shape:
            raise ArgumentError(
                f"{name}: expected shape {tuple(weight.shape)}, got {tuple(bound.shape)}"
            )
        flat.append(bound.detach().double().contiguous())
    return flat


def _of_units(
    tensors: Sequence[Tensor], what: str, units: Sequence[int], networks: int
) -> list[Tensor]:
    """Numbers of every hidden unit, per hidden layer, of all networks or of each."""
    if len(tensors) != len(units):
        raise ArgumentError(f"{what}: {len(tensors)} tensors for {len(units)} hidden layers")
    checked = []
    for index, (tensor, count) in enumerate(zip(tensors, units, strict=True)):
        name = f"{what} of layer {index}"
        check_same_device(check_floating(tensor, name), torch.empty(0), name)
        if tuple(tensor.shape) not in ((count,), (networks, count)):
            raise ArgumentError(
                f"{name}: expected shape {(count,)} or {(networks, count)}, got "
                f"{tuple(tensor.shape)}"
            )
        checked.append(tensor.detach().double().contiguous())
    return checked


@torch.library.register_fake("lipfast::chain_quadratic")
def _chain_quadratic_fake(weights: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    layers = arguments[4]
    networks, units = len(weights) // layers, sum(w.shape[0] for w in weights[: layers - 1])
    columns = (3, 1, units, units, units, layers)
    floats, integers = torch.float64, torch.int32
    dtypes = (floats, integers, floats, floats, integers, integers)
    return tuple(
        weights[0].new_empty((networks, count), dtype=dtype)
        for count, dtype in zip(columns, dtypes, strict=True)
    )
