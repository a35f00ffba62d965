"""Spectral norms of given Jacobians: the reduction against batched LAPACK."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.ops.jacobian_reduction import jacobian_reduction

SAMPLES, FEW = 4000, 400


@cache
def jacobians() -> Tensor:
    return torch.randn(SAMPLES, 10, 40, generator=torch.Generator().manual_seed(0))


def reduction_implementations() -> Implementations:
    jacobian = jacobians()
    few = jacobian[:FEW]
    return {
        "lipfast": (lambda: jacobian_reduction(jacobian), SAMPLES),
        "tuned (Gram, eigvalsh)": (lambda: baselines.gram_norms(jacobian), SAMPLES),
        "naive (SVD per sample)": (lambda: [torch.linalg.svdvals(j)[0] for j in few], FEW),
    }


@in_turn("lipfast", "tuned (Gram, eigvalsh)", "naive (SVD per sample)")
def bench_reduction(benchmark: Benchmark, turn: int, implementation: str) -> None:
    case = f"reduction of {SAMPLES} Jacobians, 10 x 40"
    measure(benchmark, case, implementation, reduction_implementations()[implementation])
