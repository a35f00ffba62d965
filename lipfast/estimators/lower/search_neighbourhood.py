"""Jacobian norms at random points around the samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.lower.search import (
    KEPT,
    Best,
    Landscape,
    check_count,
    check_positive,
)
from lipfast.estimators.results import Search

Noise = Literal["gaussian", "uniform"]


@dataclass
class Neighbourhood:
    """Random points around the samples with the largest Jacobian norms.

    The samples themselves count: the result is never below the data's own maximum.

    Attributes:
        radius: ``gaussian``: root mean square of the distance to the sample, so a standard
            deviation of radius / sqrt(D) per entry; ``uniform``: of the l2 ball. No default.
        noise: ``gaussian`` or ``uniform``.
        draws: points around each centre.
        centres: number of samples.
        seed: of the random numbers.
    """

    radius: float | None = None
    noise: Noise = "gaussian"
    draws: int = 64
    centres: int = 32
    seed: int = 0
    _best: Best = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.radius is None:
            raise ArgumentError("search='neighbourhood' needs a radius: lower_bound(..., radius=r)")
        check_positive(self.radius, "radius")
        if self.noise not in get_args(Noise):
            raise ArgumentError(f"noise must be 'gaussian' or 'uniform', got {self.noise!r}")
        check_count(self.draws, "draws")
        check_count(self.centres, "centres")
        self._best = Best(self.centres)

    def observe(self, x: Tensor, values: Tensor) -> None:
        """Keep the best samples."""
        self._best.add(x, values)

    def run(self, landscape: Landscape) -> Search:
        """Evaluate the points around each of them."""
        centres = self._best.points
        assert centres is not None
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        found = Best(KEPT)
        found.add(centres, self._best.values)
        for _ in range(self.draws):
            x = landscape.inside(centres + self._offsets(centres, generator))
            found.add(x, landscape.norms(x))
            landscape.advance(len(x))
        label = f"maximum Jacobian norm around samples ({self.noise}, radius {self.radius:g})"
        return found.result(label, landscape.norm)

    def _offsets(self, centres: Tensor, generator: torch.Generator) -> Tensor:
        assert self.radius is not None
        dimension = centres[0].numel()
        normal = torch.randn(
            len(centres), dimension, generator=generator, dtype=torch.float64, device="cpu"
        )
        if self.noise == "gaussian":
            offsets = normal * (self.radius / dimension**0.5)
        else:
            uniform = torch.rand(
                len(centres), 1, generator=generator, dtype=torch.float64, device="cpu"
            )
            distance = self.radius * uniform ** (1 / dimension)
            offsets = normal / normal.norm(dim=1, keepdim=True) * distance
        shaped: Tensor = offsets.reshape(centres.shape).to(centres)
        return shaped
