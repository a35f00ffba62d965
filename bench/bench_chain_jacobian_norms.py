"""Per-sample Jacobian norms of an MLP: the fused chain against plain PyTorch."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.estimators.jacobian import plan_jacobian_norms

SAMPLES, FEW = 1000, 20


@cache
def problem() -> tuple[nn.Module, lipfast.Plan, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    x = torch.randn(SAMPLES, 40)
    return baselines.without_parameter_gradients(model), lipfast.compile(model, x[:2]), x


def implementations() -> Implementations:
    model, plan, x = problem()
    state_dict = dict(model.state_dict())
    return {
        "lipfast": (lambda: plan_jacobian_norms(plan, [state_dict], x), SAMPLES),
        "tuned (vmap(jacrev))": (lambda: baselines.vmap_jacobian_norms(model, x), SAMPLES),
        "tuned (K x autograd.grad)": (lambda: baselines.loop_jacobian_norms(model, x), SAMPLES),
        "naive (jacobian, SVD per sample)": (
            lambda: baselines.naive_jacobian_norms(model, x[:FEW]),
            FEW,
        ),
    }


NAMES = (
    "lipfast",
    "tuned (vmap(jacrev))",
    "tuned (K x autograd.grad)",
    "naive (jacobian, SVD per sample)",
)


@in_turn(*NAMES)
def bench_samples(benchmark: Benchmark, turn: int, implementation: str) -> None:
    measure(
        benchmark,
        "Jacobian norms, 40-256-256-10, B = 1000",
        implementation,
        implementations()[implementation],
    )
