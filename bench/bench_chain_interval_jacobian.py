"""Interval Jacobians of deep narrow chains against the same sums by torch, network by network."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.ops.chain_interval_jacobian import chain_interval_jacobian
from lipfast.reference.chain_interval_jacobian import chain_interval_jacobian as by_torch

COUNT, WIDTHS = 200, (5, 50, 50, 50, 50, 50, 50, 5)


@cache
def networks() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = list(zip(WIDTHS[1:], WIDTHS[:-1], strict=True))
    return [
        [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
        for _ in range(COUNT)
    ]


@in_turn("lipfast", "tuned (torch)")
def bench_chain_interval_jacobian(benchmark: Benchmark, turn: int, implementation: str) -> None:
    weights = networks()
    hidden = [torch.zeros(width, dtype=torch.float64) for width in WIDTHS[1:-1]]
    lower, upper = [None, *hidden, None], [None, *(zero + 1 for zero in hidden), None]
    work: Implementations = {
        "lipfast": (lambda: chain_interval_jacobian(weights, lower, upper, norm=1), COUNT),
        "tuned (torch)": (
            lambda: [by_torch(own, lower, upper, math.inf) for own in weights],
            COUNT,
        ),
    }
    case = f"interval Jacobians of {COUNT} chains 5-50x6-5"
    measure(benchmark, case, implementation, work[implementation])
