"""Quadratic constraints of chains against the product of certified norms, cold and warm."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.ops.chain_quadratic import chain_quadratic
from lipfast.ops.spectral_norms import spectral_norms

NETWORKS = 100
DIMS = (40, 256, 256, 10)
COLD, WARM = 10, 1  # evaluations


def weights_of(dims: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        1.4 / before**0.5 * torch.randn(after, before, generator=generator)
        for before, after in pairwise(dims)
    ]


def relu(dims: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    units = [torch.zeros(n, dtype=torch.float64) for n in dims[1:-1]]
    return [own + 0.5 for own in units], units


@cache
def networks(moved: float = 0.0) -> list[list[Tensor]]:
    """Networks, and those a little later in their runs."""
    found = [weights_of(DIMS, seed) for seed in range(NETWORKS)]
    later = [weights_of(DIMS, NETWORKS + seed) for seed in range(NETWORKS)]
    return [
        [weight + moved * step for weight, step in zip(own, steps, strict=True)]
        for own, steps in zip(found, later, strict=True)
    ]


@cache
def earlier() -> tuple[Tensor, ...]:
    return chain_quadratic(networks(), *relu(DIMS), evaluations=COLD).logs


def product() -> None:
    spectral_norms([weight for own in networks(0.01) for weight in own])


def cold() -> None:
    chain_quadratic(networks(0.01), *relu(DIMS), evaluations=COLD)


def warm() -> None:
    chain_quadratic(networks(0.01), *relu(DIMS), evaluations=WARM, start=earlier())


def implementations() -> Implementations:
    earlier()
    return {
        "product of norms": (product, NETWORKS),
        f"quadratic, {COLD} evaluations": (cold, NETWORKS),
        f"quadratic, warm, {WARM} evaluations": (warm, NETWORKS),
    }


@in_turn(
    "product of norms", f"quadratic, {COLD} evaluations", f"quadratic, warm, {WARM} evaluations"
)
def bench_many_networks(benchmark: Benchmark, turn: int, implementation: str) -> None:
    dims = "-".join(map(str, DIMS))
    case = f"certified bounds of {NETWORKS} networks {dims}"
    measure(benchmark, case, implementation, implementations()[implementation])
