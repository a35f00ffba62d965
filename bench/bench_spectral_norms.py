"""Spectral norms: the certified bracket (gap 1e-6), the estimate, and what plain PyTorch does."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure

CASES = {
    "16 x (512 x 512)": (16, ((512, 512),)),
    "100 x (256 x 40, 256 x 256, 10 x 256)": (100, ((256, 40), (256, 256), (10, 256))),
}


@cache
def matrices(case: str) -> list[Tensor]:
    count, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count) for shape in shapes]


def implementations(case: str) -> Implementations:
    weights = matrices(case)
    few = weights[: max(3, len(weights) // 10)]
    return {
        "lipfast": (lambda: lipfast.spectral_norms(weights), len(weights)),
        "lipfast, estimate only": (
            lambda: lipfast.spectral_norms(weights, certify=False),
            len(weights),
        ),
        "tuned (svdvals)": (lambda: [baselines.tuned_spectral_norm(w) for w in few], len(few)),
        "naive (100 power iterations)": (
            lambda: [baselines.naive_spectral_norm(w) for w in few],
            len(few),
        ),
    }


NAMES = tuple(implementations(next(iter(CASES))))


@in_turn(*NAMES)
def bench_middle(benchmark: Benchmark, turn: int, implementation: str) -> None:
    case = next(iter(CASES))
    measure(
        benchmark, f"spectral norms, {case}", implementation, implementations(case)[implementation]
    )


@in_turn(*NAMES)
def bench_small(benchmark: Benchmark, turn: int, implementation: str) -> None:
    case = list(CASES)[1]
    measure(
        benchmark, f"spectral norms, {case}", implementation, implementations(case)[implementation]
    )
