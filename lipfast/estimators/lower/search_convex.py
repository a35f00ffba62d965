"""Jacobian norms at convex combinations of samples: the study's S*."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipfast.estimators.lower.search import KEPT, Best, Landscape, Reservoir, check_count
from lipfast.estimators.results import Search

_WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5)
_TOGETHER = 1024


@dataclass
class Convex:
    """``(1 - w) a + w b`` for random pairs of samples and w in .1, .2, .3, .4, .5.

    With the data themselves this is S* of Khromov and Singh (ICLR 2024): the result is never below
    the data's own maximum.

    Attributes:
        draws: number of combinations.
        limit: samples that pairs are drawn from, a random subset of the data.
        seed: of the random numbers.
    """

    draws: int = 2000
    limit: int = 10_000
    seed: int = 0
    _best: Best = field(init=False, repr=False)
    _pool: Reservoir = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.draws, "draws", most=2**31)
        check_count(self.limit, "limit")
        self._best = Best(KEPT)
        self._pool = Reservoir(self.limit, self.seed)

    def observe(self, x: Tensor, values: Tensor) -> None:
        """Keep the best samples and some to combine."""
        self._best.add(x, values)
        self._pool.add(x)

    def run(self, landscape: Landscape) -> Search:
        """Evaluate the combinations."""
        combined(self._pool.samples(), self.draws, self.seed, landscape, self._best)
        label = "maximum Jacobian norm over samples and their convex combinations (S*)"
        return self._best.result(label, landscape.norm)


def combined(pool: Tensor, draws: int, seed: int, landscape: Landscape, best: Best) -> None:
    """Add convex combinations of random pairs of samples (n, D...) to the best points."""
    generator = torch.Generator(device="cpu").manual_seed(seed + 1)
    drawn = torch.randint(len(pool), (2, draws), generator=generator, device="cpu")
    first, second = drawn.to(pool.device)
    weights = torch.tensor(_WEIGHTS, dtype=torch.float64, device="cpu").to(pool)
    weights = weights.repeat(-(-draws // 5))
    for start in range(0, draws, _TOGETHER):
        part = slice(start, min(start + _TOGETHER, draws))
        w = weights[part].reshape(-1, *[1] * (pool.dim() - 1))
        x = landscape.inside(torch.lerp(pool[first[part]], pool[second[part]], w))
        best.add(x, landscape.norms(x))
        landscape.advance(len(x))
