"""Per-sample Jacobian norms from explicit Jacobians, in blocks that fit a memory budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import Tensor

from lipfast.estimators.jacobian.function import SampleFunction
from lipfast.estimators.jacobian.linearization import (
    DerivativeError,
    Footprint,
    Linearization,
    footprint,
    is_small,
)
from lipfast.norms import Norm, dual_norm
from lipfast.ops.jacobian_reduction import RowReduction, operator_norms

# Tensors of the largest activation's size that a backward pass holds at once.
_WORKING = 4
# On the CPU larger blocks are no faster: their intermediates leave the cache.
_FASTEST_BYTES = 1 << 26


def row_norms(problem: SampleFunction, size: Footprint, norm: Norm, memory: int) -> Tensor:
    """Operator norms (B,) of the Jacobians, formed row by row or column by column.

    min(K, D) products per sample: backward passes, or passes through them where D < K.
    """
    if size.inputs < size.outputs:
        with suppress(DerivativeError):
            return _block_norms(problem, size, norm, memory, by_columns=True)
    return _block_norms(problem, size, norm, memory, by_columns=False)


def explicit_jacobians(problem: SampleFunction, memory: int) -> Iterator[Tensor]:
    """Jacobians (b, K, D) of blocks of samples, by backward passes; at least one sample a block."""
    size = footprint(problem)
    for part in _blocks(problem.x, max(1, memory // bytes_of_rows(size, size.outputs))):
        yield Linearization(problem.function, part).rows(0, size.outputs)


def bytes_of_rows(size: Footprint, products: int) -> int:
    """Per sample: what the passes keep, their working set, and the Jacobian twice (a copy)."""
    jacobian = 2 * size.inputs * size.outputs * size.item
    return 3 * size.saved + _WORKING * products * size.largest + jacobian


def _blocks(x: Tensor, most: int) -> tuple[Tensor, ...]:
    """Blocks of nearly equal size: a single sample at the end would upset squeeze() in a model."""
    return torch.tensor_split(x, -(-len(x) // max(1, most)))


def _block_norms(
    problem: SampleFunction, size: Footprint, norm: Norm, memory: int, *, by_columns: bool
) -> Tensor:
    products = size.inputs if by_columns else size.outputs
    each = bytes_of_rows(size, products)
    if each > memory:
        return _streamed(problem, size, norm, memory, by_columns=by_columns)
    effective = dual_norm(norm) if by_columns else norm
    fastest = _FASTEST_BYTES if problem.x.is_cpu else memory
    most = max(1, min(memory, fastest) // each)
    norms = []
    for part in _blocks(problem.x, most):
        linear = Linearization(problem.function, part, problem.checks)
        rows = linear.columns(0, products) if by_columns else linear.rows(0, products)
        norms.append(operator_norms(rows, effective))
    return torch.cat(norms)


def _streamed(
    problem: SampleFunction, size: Footprint, norm: Norm, memory: int, *, by_columns: bool
) -> Tensor:
    """One sample at a time, some rows (or columns) at a time.

    For norm 2 the rows of the smaller side are kept, or, where that would be many, the Gram matrix
    of the smaller side, which takes the products of the larger one.
    """
    gathered = norm == 2 and not is_small(size.outputs, size.inputs)
    if gathered and size.inputs != size.outputs:
        by_columns = size.outputs < size.inputs
    products, length = size.outputs, size.inputs
    if by_columns:
        products, length = length, products
    effective = dual_norm(norm) if by_columns else norm
    gram = 8 * length * length if gathered else 0
    per_row = _WORKING * size.largest + 4 * 8 * length
    block = int(min(max(1, (memory - 3 * size.saved - gram) // per_row), products))
    norms = []
    for sample in torch.split(problem.x, 1):
        linear = Linearization(problem.function, sample, problem.checks)
        reduction = RowReduction(1, products, length, spectral=norm == 2, device=sample.device)
        for start in range(0, products, block):
            stop = min(start + block, products)
            rows = linear.columns(start, stop) if by_columns else linear.rows(start, stop)
            reduction.add(rows)
        norms.append(reduction.norms(effective))
    return torch.cat(norms)
