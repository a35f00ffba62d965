"""The kernels that the harness runs, on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lipfast.ops.chain_stages import Activation, Stage, encode_activation
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
) -> Spectral:
    """One call of the grouped kernel; small items, so that matrices have several.

    resident_shared: bytes of the blocks that hold a matrix; 0: the grid shares all of them.
    """
    count = len(matrices)
    starts = starts or [None] * count
    shapes = [
        [_CODES[matrix.dtype], *matrix.shape, start is not None]
        for matrix, start in zip(matrices, starts, strict=True)
    ]
    inputs: list[np.ndarray | Sequence[int]] = [
        [count, max_passes, power, certify, 0, grid, block, seed, item_bytes, resident_shared],
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
    )
    lower, upper, passes, method, right, left = [torch.from_numpy(value) for value in values]
    return Spectral(lower, upper, passes, method, list(right.split(cols)), list(left.split(rows)))


def cholesky_residual(
    harness: Harness,
    matrices: Tensor,
    factors: Tensor,
    shifts: Tensor,
    *,
    grid: int = 2,
    seed: int = 1,
) -> Tensor:
    """Partial sums (B, tiles, 2)."""
    edge = (matrices.shape[1] + 31) // 32
    tiles = edge * (edge + 1) // 2
    inputs = [list(matrices.shape), _seeded_grid(grid, seed)]
    arrays = [matrices.numpy(), factors.numpy(), shifts.numpy()]
    result = harness.run("cholesky_residual", [*inputs, *arrays])
    (partial,) = result.take((np.float64, 2 * len(matrices) * tiles))
    return torch.from_numpy(partial).reshape(len(matrices), tiles, 2)


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
    layers, activations, starts = 0, [], [0] * len(widths)
    for stage in stages:
        if isinstance(stage, Activation):
            activations.append(stage)
        else:
            layers += 1
        starts[layers] = len(activations)
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
