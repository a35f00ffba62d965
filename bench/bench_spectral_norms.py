"""Spectral norms: the certified bracket (gap 1e-6), the estimate, and what others do.

`lipfast` proves both sides. `lipfast, estimate only` is a lower estimate to 1e-6, and so is what it
is compared with: power iterations and singular values prove nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import lipfast
from bench import baselines
from bench.peers import PEERS, norms, skip_unless_installed
from bench.turns import Benchmark, Implementations, in_turn, measure

CERTIFIED, ESTIMATE = "lipfast", "lipfast, estimate only"
NAIVE = "naive (100 power iterations)"
TUNED = {
    "tuned (svdvals)": lambda w: torch.linalg.svdvals(w)[0],
    "tuned (matrix_norm, ord=2)": baselines.tuned_spectral_norm,
    "tuned (eigvalsh of the Gram matrix)": lambda w: baselines.gram_norms(w.double()[None]),
}
NAMES = (CERTIFIED, ESTIMATE, NAIVE, *TUNED, *PEERS)


@pytest.fixture(scope="module", autouse=True)
def forget_matrices() -> Iterator[None]:
    """The matrices of a case do not outlive the module."""
    yield
    for function in (gaussian, triples, changed_matrix):
        function.cache_clear()


@cache
def gaussian(count: int, rows: int, cols: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, cols, generator=generator) for _ in range(count)]


@cache
def triples(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((256, 40), (256, 256), (10, 256))
    return [torch.randn(shape, generator=generator) for _ in range(count) for shape in shapes]


def spectral_norm_implementations(
    weights: list[Tensor], units: int, few: list[Tensor], few_units: int
) -> Implementations:
    """lipfast on all weights in one call, the others on a few of them, one by one."""
    work: Implementations = {
        CERTIFIED: (lambda: lipfast.spectral_norms(weights), units),
        ESTIMATE: (lambda: lipfast.spectral_norms(weights, certify=False), units),
        NAIVE: (lambda: [baselines.naive_spectral_norm(w) for w in few], few_units),
    }
    for name, tuned in TUNED.items():
        work[name] = (lambda tuned=tuned: [tuned(w) for w in few], few_units)  # type: ignore[misc]
    for name, peer in PEERS.items():
        work[name] = (lambda peer=peer: norms(peer, few), few_units)  # type: ignore[misc]
    return work


@in_turn(*NAMES)
def bench_middle(benchmark: Benchmark, turn: int, implementation: str) -> None:
    skip_unless_installed(implementation)
    weights = gaussian(16, 512, 512)
    work = spectral_norm_implementations(weights, 16, weights[:4], 4)[implementation]
    measure(benchmark, "spectral norms, 16 x (512 x 512), per matrix", implementation, work)


@in_turn(*NAMES, turns=3, once=(*list(TUNED)[1:], "peer (weightwatcher)"))
def bench_large(benchmark: Benchmark, turn: int, implementation: str) -> None:
    skip_unless_installed(implementation)
    weights = gaussian(1, 4096, 4096)
    work = spectral_norm_implementations(weights, 1, weights, 1)[implementation]
    case = "spectral norms, one 4096 x 4096"
    measure(benchmark, case, implementation, work, warmup=implementation == ESTIMATE)


TRIPLES, DIFFERENT, FEW = 10_000, 500, 10


@in_turn(*NAMES, turns=3, once=(CERTIFIED,))
def bench_triples(benchmark: Benchmark, turn: int, implementation: str) -> None:
    """10,000 triples: 500 of them, 20 times each, so that they fit into memory (not the cache)."""
    skip_unless_installed(implementation)
    different = triples(DIFFERENT)
    weights = different * (TRIPLES // DIFFERENT)
    work = spectral_norm_implementations(weights, TRIPLES, different[: 3 * FEW], FEW)[
        implementation
    ]
    case = "spectral norms, 10,000 triples (40 x 256, 256 x 256, 256 x 10), per triple"
    measure(
        benchmark, case, implementation, work, warmup=implementation not in (CERTIFIED, ESTIMATE)
    )


CHANGES = (1e-3, 1e-2)
WARM = tuple(f"lipfast, estimate, warm, relative change {change:g}" for change in CHANGES)
CERTIFIED_WARM = tuple(
    f"lipfast, certified, warm, relative change {change:g}" for change in CHANGES
)


@cache
def changed_matrix(change: float) -> tuple[Tensor, Tensor]:
    """A matrix after a relative change, and the right singular vector before it."""
    (before,) = gaussian(1, 4096, 1024)
    noise = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
    after = before + change * noise * (before.norm() / noise.norm())
    return after, lipfast.spectral_norms([before], certify=False).right[0]


@in_turn(CERTIFIED, *CERTIFIED_WARM, ESTIMATE, *WARM, NAIVE, turns=3)
def bench_warm_start(benchmark: Benchmark, turn: int, implementation: str) -> None:
    certify = implementation in (CERTIFIED, *CERTIFIED_WARM)
    change = CHANGES[implementation in (WARM[1], CERTIFIED_WARM[1])]
    matrix, vector = changed_matrix(change)
    start = [vector] if implementation in (*WARM, *CERTIFIED_WARM) else None

    def call() -> object:
        if implementation == NAIVE:
            return baselines.naive_spectral_norm(matrix)
        return lipfast.spectral_norms([matrix], start=start, certify=certify)

    measure(benchmark, "spectral norms, 4096 x 1024, warm start", implementation, (call, 1))
