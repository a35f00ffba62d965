"""Projected gradient ascent on the Jacobian norm."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.floor.inputs import inputs_of_pattern
from lipfast.estimators.floor.search import pattern_search
from lipfast.estimators.jacobian.gradient import differentiable_values
from lipfast.estimators.lower.search import (
    KEPT,
    Best,
    Landscape,
    Reservoir,
    check_count,
    check_positive,
)
from lipfast.estimators.lower.search_convex import combined
from lipfast.estimators.results import Search

# A step that does not lead up is taken back and halved, one that does makes the next one longer.
_SHRINK, _GROW = 0.5, 1.5
# Random steps are between this part of the first step length and all of it.
_SHORTEST_STEP = 0.03


StartsFrom = Literal["data", "convex", "pattern"]


@dataclass
class Ascent:
    """``x <- P(x + h g / ||g||)`` with g the gradient of ||J(x)||, from the best starts.

    P projects to the domain. Steps that do not increase the norm are taken back, so the result is
    never below the data's own maximum. The gradient of a piecewise linear network's Jacobian norm
    is 0 almost everywhere; there the step is a random one of random length.

    Starts are the best samples, and the best of each that `starts_from` adds: ``convex``: random
    convex combinations of samples, as search="convex" draws them; ``pattern``: inputs whose units
    have nearly the slopes of the largest Jacobian that slopes make (what `bounds(floor=True)` looks
    for), by least squares and steps on what activations read. Both reach norms that an ascent from
    the data does not, and take longer.

    Attributes:
        steps: of each start.
        starts: their number, of each kind.
        step: first step length h, by default a tenth of the start's l2 norm (or 1).
        seed: of everything random.
        starts_from: ``data``, or several of ``data``, ``convex`` and ``pattern``; samples are
            always among them.
        draws: convex combinations.
        limit: samples that they are of, a random subset of the data.
    """

    steps: int = 50
    starts: int = 8
    step: float | None = None
    seed: int = 0
    starts_from: StartsFrom | Collection[StartsFrom] = "data"
    draws: int = 2000
    limit: int = 10_000
    _best: Best = field(init=False, repr=False)
    _pool: Reservoir | None = field(init=False, repr=False)
    _sources: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.draws, "draws", most=2**31)
        check_count(self.limit, "limit")
        self._sources = _sources_of(self.starts_from)
        self._pool = Reservoir(self.limit, self.seed) if "convex" in self._sources else None
        check_count(self.steps, "steps")
        check_count(self.starts, "starts")
        if self.step is not None:
            check_positive(self.step, "step")
        self._best = Best(self.starts)

    def observe(self, x: Tensor, values: Tensor) -> None:
        """Keep the best samples, and some to combine."""
        self._best.add(x, values)
        if self._pool is not None:
            self._pool.add(x)

    def run(self, landscape: Landscape) -> Search:
        """Climb from each of them."""
        kinds = [self._best, *self._other_starts(landscape)]
        x = torch.cat([kind.points for kind in kinds if kind.points is not None])
        values = torch.cat([kind.values for kind in kinds])
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
        found = Best(max(KEPT, len(x)))
        found.add(x, values)
        label = f"maximum Jacobian norm after gradient ascent ({self.steps} steps)"
        return found.result(label, landscape.norm)

    def _other_starts(self, landscape: Landscape) -> Iterator[Best]:
        if self._pool is not None:
            found = Best(self.starts)
            combined(self._pool.samples(), self.draws, self.seed, landscape, found)
            yield found
        if "pattern" in self._sources:
            found = Best(self.starts)
            x = _inputs_of_largest_pattern(landscape, self._best, self.seed)
            found.add(x, landscape.norms(x))
            yield found


def _sources_of(names: object) -> frozenset[str]:
    known = get_args(StartsFrom)
    several = isinstance(names, Collection) and not isinstance(names, str)
    given = tuple(names) if several else (names,)  # type: ignore[arg-type]
    if not given or any(name not in known for name in given):
        raise ArgumentError(
            f"starts_from must be one or several of {', '.join(known)}, not {names!r}"
        )
    return frozenset(map(str, given))


def _inputs_of_largest_pattern(landscape: Landscape, best: Best, seed: int) -> Tensor:
    """Inputs (P, *shape) that have nearly the slopes of the largest pattern.

    Raises:
        ArgumentError: the model has no slopes that could be searched.
    """
    needs = "starts_from='pattern' needs"
    if isinstance(landscape.plan, str):
        raise ArgumentError(
            f"{needs} a model of one input that lipfast.compile can trace: {landscape.plan}"
        )
    assert best.points is not None
    search = pattern_search(
        landscape.plan,
        [landscape.parameters],
        norm=landscape.norm,
        effort=2,
        seed=seed,
        memory=landscape.memory,
        advance=landscape.advance,
    )
    if isinstance(search, str):
        raise ArgumentError(f"{needs} slopes of all activations: {search}")
    near = best.points.double()
    pattern = search.run(1, near[:1])
    return inputs_of_pattern(search, pattern, near, landscape.inside).to(best.points)


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
