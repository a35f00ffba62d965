"""Jacobian norms of a model with many outputs: Lanczos against forming every Jacobian."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure

SAMPLES, FEW = 64, 1


@cache
def wide_problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1000))
    return baselines.without_parameter_gradients(model), torch.randn(SAMPLES, 784)


def wide_implementations() -> Implementations:
    model, x = wide_problem()
    return {
        "lipfast": (lambda: lipfast.jacobian_norms(model, x), SAMPLES),
        "tuned (vmap(jacrev))": (lambda: baselines.vmap_jacobian_norms(model, x), SAMPLES),
        "tuned (K x autograd.grad)": (lambda: baselines.loop_jacobian_norms(model, x), SAMPLES),
        "naive (jacobian, SVD per sample)": (
            lambda: baselines.naive_jacobian_norms(model, x[:FEW]),
            FEW,
        ),
    }


@in_turn(
    "lipfast",
    "tuned (vmap(jacrev))",
    "tuned (K x autograd.grad)",
    "naive (jacobian, SVD per sample)",
    turns=3,
)
def bench_many_outputs(benchmark: Benchmark, turn: int, implementation: str) -> None:
    measure(
        benchmark,
        f"Jacobian norms, 784-1024-1000, B = {SAMPLES}",
        implementation,
        wide_implementations()[implementation],
        warmup=implementation == "lipfast",
    )
