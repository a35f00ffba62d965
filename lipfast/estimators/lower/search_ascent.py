"""Projected gradient ascent on the Jacobian norm."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.gradient import differentiable_values
from lipfast.estimators.lower.search import (
    KEPT,
    Best,
    Landscape,
    check_count,
    check_positive,
)
from lipfast.estimators.results import Search

# A step that does not lead up is taken back and halved, one that does makes the next one longer.
_SHRINK, _GROW = 0.5, 1.5
# Random steps are between this part of the first step length and all of it.
_SHORTEST_STEP = 0.03


@dataclass
class Ascent:
    """``x <- P(x + h g / ||g||)`` with g the gradient of ||J(x)||, from the best samples.

    P projects to the domain. Steps that do not increase the norm are taken back, so the result is
    never below the data's own maximum. The gradient of a piecewise linear network's Jacobian norm
    is 0 almost everywhere; there the step is a random one of random length.

    Attributes:
        steps: of each start.
        starts: number of samples.
        step: first step length h, by default a tenth of the start's l2 norm (or 1).
        seed: of the random steps.
    """

    steps: int = 50
    starts: int = 8
    step: float | None = None
    seed: int = 0
    _best: Best = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.steps, "steps")
        check_count(self.starts, "starts")
        if self.step is not None:
            check_positive(self.step, "step")
        self._best = Best(self.starts)

    def observe(self, x: Tensor, values: Tensor) -> None:
        """Keep the best samples."""
        self._best.add(x, values)

    def run(self, landscape: Landscape) -> Search:
        """Climb from each of them."""
        assert self._best.points is not None
        x, values = self._best.points, self._best.values
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        sizes = x.reshape(len(x), -1).double().norm(dim=1)
        first = torch.where(sizes > 0, 0.1 * sizes, 1.0)
        if self.step is not None:
            first = torch.full_like(first, self.step)
        lengths = first.clone()
        shape = (-1, *[1] * (x.dim() - 1))
        for _ in range(self.steps):
            gradient = _gradients(landscape, x)
            size = gradient.reshape(len(gradient), -1).double().norm(dim=1)
            smooth = torch.isfinite(size) & (size > 0)
            # Steps that became too short would never leave a linear region: random ones do not.
            random = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
            spread = _SHORTEST_STEP ** torch.rand(
                len(x), generator=generator, dtype=torch.float64, device="cpu"
            )
            random, spread = random.to(x.device), spread.to(x.device)
            random_scale = first * spread / random.reshape(len(random), -1).norm(dim=1)
            moves = torch.where(
                smooth.reshape(shape),
                gradient.double() * (lengths / torch.where(smooth, size, 1)).reshape(shape),
                random * random_scale.reshape(shape),
            )
            trial = landscape.inside(x + moves.to(x))
            reached = landscape.norms(trial).double()
            better = reached > values
            x = torch.where(better.reshape(shape), trial, x)
            values = torch.where(better, reached, values)
            lengths = lengths * torch.where(better, _GROW, _SHRINK)
            landscape.advance(len(x))
        found = Best(max(KEPT, self.starts))
        found.add(x, values)
        label = f"maximum Jacobian norm after gradient ascent ({self.steps} steps)"
        return found.result(label, landscape.norm)


def _gradients(landscape: Landscape, x: Tensor) -> Tensor:
    """Gradients of the norms; zeros where the model has no second derivatives."""
    with torch.inference_mode(False):
        leaf = x.detach().clone().requires_grad_()
        try:
            problem = replace(landscape.problem, x=leaf)
            values = differentiable_values(problem, landscape.norm, "auto", landscape.memory)
        except ArgumentError:
            return torch.zeros_like(leaf)
        if not values.requires_grad:
            return torch.zeros_like(x)
        # Second derivatives of the model: absent in a piecewise linear one.
        (gradient,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient.detach()
