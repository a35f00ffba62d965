"""The kernels that the harness runs, on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipfast.ops.chain_stages import Activation, Stage, encode_activation
from lipfast.ops.tap_products import tap_differences
from tests.support.harness import Harness

_CODES = {torch.float32: 0, torch.float64: 1}


def _seeded_grid(grid: int, seed: int) -> list[int]:
    return [grid, seed]


def jacobian_reduction(
    harness: Harness, jacobian: Tensor, *, grid: int = 2, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Spectral and Frobenius norms (B,)."""
    numbers = [_CODES[jacobian.dtype], *jacobian.shape, *_seeded_grid(grid, seed)]
    result = harness.run("jacobian_reduction", [numbers, jacobian.numpy()])
    kind = jacobian.numpy().dtype.type
    spectral, frobenius = result.take((kind, len(jacobian)), (kind, len(jacobian)))
    return torch.from_numpy(spectral), torch.from_numpy(frobenius)


@dataclass(frozen=True)
class Spectral:
    """What the spectral kernel returns."""

    lower: Tensor
    upper: Tensor
    passes: Tensor
    method: Tensor
    right: list[Tensor]
    left: list[Tensor]
    tables: int  # launches that it took to say where the matrices are


def spectral_norms(
    harness: Harness,
    matrices: Sequence[Tensor],
    *,
    starts: Sequence[Tensor | None] | None = None,
    power: bool = False,
    certify: bool = True,
    max_passes: int = 300,
    tolerance: float = 1e-9,
    grid: int = 3,
    block: int = 64,
    seed: int = 1,
    item_bytes: int = 1024,
    resident_shared: int = 0,
    together: bool = False,
) -> Spectral:
    """One call of the grouped kernel; small items, so that matrices have several.

    resident_shared: bytes of the blocks that hold a matrix; 0: the grid shares all of them.
    together: matrices of a type lie in one array.
    """
    count = len(matrices)
    starts = starts or [None] * count
    shapes = [
        [_CODES[matrix.dtype], *matrix.shape, start is not None]
        for matrix, start in zip(matrices, starts, strict=True)
    ]
    inputs: list[np.ndarray | Sequence[int]] = [
        [count, max_passes, power, certify, 0, grid, block, seed, item_bytes],
        [resident_shared, together],
        [int(number) for shape in shapes for number in shape],
        np.array([tolerance]),
    ]
    for matrix, start in zip(matrices, starts, strict=True):
        inputs.append(matrix.numpy())
        if start is not None:
            inputs.append(start.numpy())
    rows, cols = [len(matrix) for matrix in matrices], [matrix.shape[1] for matrix in matrices]
    result = harness.run("spectral_norms", inputs)
    values = result.take(
        (np.float64, count),
        (np.float64, count),
        (np.int64, count),
        (np.int64, count),
        (np.float64, sum(cols)),
        (np.float64, sum(rows)),
        (np.int64, 1),
    )
    *tensors, right, left, tables = [torch.from_numpy(value) for value in values]
    return Spectral(*tensors, list(right.split(cols)), list(left.split(rows)), int(tables))


def hermitian_residual(
    harness: Harness,
    hermitian: Tensor,
    matrices: Tensor,
    factors: Tensor,
    *,
    grid: int = 2,
    seed: int = 1,
) -> Tensor:
    """Partial sums (B, tiles, 2)."""
    edge = (matrices.shape[1] + 31) // 32
    tiles = edge * (edge + 1) // 2
    arrays = [tensor.numpy() for tensor in (hermitian, matrices, factors)]
    numbers = [list(matrices.shape), _seeded_grid(grid, seed)]
    result = harness.run("hermitian_residual", [*numbers, *arrays])
    (partial,) = result.take((np.float64, 2 * len(matrices) * tiles))
    return torch.from_numpy(partial).reshape(len(matrices), tiles, 2)


def tap_products(
    harness: Harness, taps: Tensor, axes: Sequence[int], *, grid: int = 2, seed: int = 1
) -> Tensor:
    """(symbols, differences, n, n)."""
    symbols, _, n, m = taps.shape
    numbers = [symbols, n, m, *axes, *_seeded_grid(grid, seed)]
    count = symbols * len(tap_differences(axes))
    (found,) = harness.run("tap_products", [numbers, taps.numpy()]).take(
        (np.float64, count * n * n)
    )
    return torch.from_numpy(found).reshape(symbols, -1, n, n)


def symbol_grams(
    harness: Harness,
    products: Tensor,
    axes: Sequence[int],
    frequencies: tuple[Tensor, Tensor, Sequence[int]],
    shifts: Tensor,
    *,
    grid: int = 2,
    seed: int = 1,
) -> Tensor:
    """(count, n, n), complex. frequencies: which symbols, centres, periods."""
    symbols, centres, periods = frequencies
    count, n = len(symbols), products.shape[3]
    numbers = [len(products), count, n, *axes, *periods, *_seeded_grid(grid, seed)]
    arrays = [tensor.numpy() for tensor in (products, symbols, centres, shifts)]
    (found,) = harness.run("symbol_grams", [numbers, *arrays]).take((np.complex128, count * n * n))
    return torch.from_numpy(found).reshape(count, n, n)


def shifted_grams(
    harness: Harness,
    matrices: Tensor,
    lower: Tensor,
    *,
    excess: float = 1e-6,
    grid: int = 2,
    seed: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrices (B, s, s), scales and shifts (B,); transposed matrices are read as they lie."""
    count, side, _ = matrices.shape
    given = _certificate_inputs(matrices, grid, seed)
    result = harness.run("shifted_grams", [*given, lower.numpy(), np.array([excess])])
    sizes = (count * side * side, count, count)
    grams, *rest = [torch.from_numpy(v) for v in result.take(*((np.float64, n) for n in sizes))]
    return grams.reshape(count, side, side), *rest


def cholesky_bounds(
    harness: Harness,
    matrices: Tensor,
    *given: Tensor,
    room: tuple[float, float],
    grid: int = 2,
    seed: int = 1,
) -> Tensor:
    """Upper bounds (B,); given: factors, failures, scales and shifts."""
    factors, failures, *rest = given
    arrays = [tensor.numpy() for tensor in (factors, failures.long(), *rest)]
    inputs = [*_certificate_inputs(matrices, grid, seed), *arrays, np.array(room)]
    (upper,) = harness.run("cholesky_bounds", inputs).take((np.float64, len(matrices)))
    return torch.from_numpy(upper)


def _certificate_inputs(matrices: Tensor, grid: int, seed: int) -> list[Any]:
    transposed = not matrices.is_contiguous()
    stored = matrices.mT if transposed else matrices
    numbers = [*_seeded_grid(grid, seed), matrices.dtype == torch.float32, transposed]
    return [list(matrices.shape), numbers, stored.numpy()]


def _activations_of(stages: Sequence[Stage], layers: int) -> tuple[list[Activation], list[int]]:
    """All activations, and where those before and after each layer begin and end."""
    activations, starts, layer = [], [0] * (layers + 2), 0
    for stage in stages:
        if isinstance(stage, Activation):
            activations.append(stage)
        else:
            layer += 1
        starts[layer + 1] = len(activations)
    return activations, starts


def chain_jacobian_norms(
    harness: Harness,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
    *,
    grid: int = 2,
    seed: int = 1,
    offset: int = 0,
    warps: int = 4,
    rounds: int = 2,
    dense: bool = True,
) -> tuple[Tensor, Tensor]:
    """Spectral and Frobenius norms (networks, B).

    offset: where weights begin in their storage. dense: whether tensor cores may be used.
    """
    widths = [x.shape[1], *[len(weight) for weight in weights[0]]]
    layers = len(widths) - 1
    activations, (_, *starts) = _activations_of(stages, layers)
    numbers = [_CODES[x.dtype], len(x), len(weights), layers, *_seeded_grid(grid, seed)]
    parameters = [encode_activation(stage, 0)[1] for stage in activations]
    codes = [stage.function.code for stage in activations]
    inputs: list[np.ndarray | Sequence[int]] = [
        [*numbers, offset, warps, rounds, dense, *widths, *starts, *codes],
        np.array(parameters, dtype=np.float64),
        x.numpy(),
    ]
    for network, network_biases in zip(weights, biases, strict=True):
        for weight, bias in zip(network, network_biases, strict=True):
            inputs += [weight.numpy(), [bias is not None]]
            if bias is not None:
                inputs.append(bias.numpy())
    result = harness.run("chain_jacobian_norms", inputs)
    kind, count = x.numpy().dtype.type, len(weights) * len(x)
    norms = result.take((kind, count), (kind, count))
    spectral, frobenius = [torch.from_numpy(norm.reshape(len(weights), -1)) for norm in norms]
    return spectral, frobenius


@dataclass(frozen=True)
class Secants:
    """What the two kernels of secants return; `loose` as numbers."""

    points: Tensor
    values: Tensor
    loose: Tensor
    ends: Tensor


def chain_secants(
    harness: Harness,
    x: Tensor,
    weights: Sequence[Sequence[Tensor]],
    biases: Sequence[Sequence[Tensor | None]],
    stages: Sequence[Stage],
    *,
    norm: float = 2,
    fractions: Sequence[float] = (0.99, 0.5),
    ladder: Sequence[float] = (1.0, 0.1, 1e-3),
    spaced: bool = False,
    grid: int = 2,
    seed: int = 1,
) -> Secants:
    """From samples (networks, D), or the quotients alone from points (networks, C, D)."""
    widths = [x.shape[-1], *[len(weight) for weight in weights[0]]]
    layers = len(widths) - 1
    activations, starts = _activations_of(stages, layers)
    code = 0 if math.isinf(norm) else int(norm)
    dtype, networks = weights[0][0].dtype, len(weights)
    inputs: list[np.ndarray | Sequence[int]] = [
        [_CODES[dtype], networks, layers, code, spaced, grid, seed, *widths, *starts]
    ]
    for stage in activations:
        low, high = stage.parameters if stage.name == "hardtanh" else (0.0, math.inf)
        leaky, limited = stage.name == "leaky_relu", stage.name == "relu6"
        slope = stage.parameters[0] if leaky else 0.0
        inputs += [[leaky, limited], np.array([low, 6.0 if limited else high, slope])]
    for index in range(layers) if spaced else range(networks * layers):
        own = [index] if not spaced else [n * layers + index for n in range(networks)]
        pairs = [(weights[i // layers][i % layers], biases[i // layers][i % layers]) for i in own]
        inputs += [torch.stack([weight for weight, _ in pairs]).numpy(), [pairs[0][1] is not None]]
        inputs += [bias.numpy() for _, bias in pairs if bias is not None]
    count = 1 + 2 * (len(fractions) + len(ladder))
    inputs += [[x.dim() == 3, len(fractions), len(fractions) + len(ladder)]]
    inputs += [np.array([*fractions, *ladder]), x.double().numpy()]
    result = harness.run("chain_secants", inputs)
    sizes = (count * networks * widths[0], 2 * networks, 2 * networks * widths[0])
    points, found, ends = [
        torch.from_numpy(values) for values in result.take(*((np.float64, n) for n in sizes))
    ]
    found = found.reshape(networks, 2)
    return Secants(
        points.reshape(networks, count, -1), found[:, 0], found[:, 1], ends.reshape(networks, 2, -1)
    )


def stack(harness: Harness, values: Tensor, places: Sequence[int], size: int, unit: int) -> Tensor:
    """(tensors, size) bytes from an array of them, at places that `unit` divides."""
    numbers = [len(places), size, unit, len(values), 1, *(place // unit for place in places)]
    result = harness.run("stack", [numbers, values.numpy()])
    (out,) = result.take((np.uint8, len(places) * size))
    return torch.from_numpy(out).reshape(len(places), size)
