"""Searches for large Jacobian norms beyond the data: what they share. One method per file."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Protocol

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Box, Domain
from lipfast.estimators.estimate import Estimate, log_down
from lipfast.estimators.jacobian.function import SampleFunction
from lipfast.estimators.results import Search
from lipfast.norms import Norm
from lipfast.plan.architecture import Architecture

# Points that a search returns.
KEPT = 8
_DERIVATIVE = "a derivative in floating point; the certified value is a difference quotient near it"


@dataclass(frozen=True)
class Landscape:
    """What a search may evaluate.

    Attributes:
        norms: Jacobian norms (B,) at points (B, D...).
        problem: the model as a function, (B, D...) -> (B, K).
        module: the model itself.
        example: one sample of each input of the module.
        norm: 1, 2 or inf.
        domain: where to look; None for everywhere.
        memory: bytes for intermediate results.
        plan: of the model, or why it has none.
        parameters: of the plan.
        advance: to be told how many evaluations are done.
    """

    norms: Callable[[Tensor], Tensor]
    problem: SampleFunction
    module: nn.Module
    example: tuple[Tensor, ...]
    norm: Norm
    domain: Domain | None
    memory: int
    advance: Callable[[int], None]
    plan: Architecture | str
    parameters: Mapping[str, Tensor]

    def inside(self, x: Tensor) -> Tensor:
        """The nearest points of the domain, for points (B, D...)."""
        return x if self.domain is None else self.domain.project(x.unsqueeze(0)).squeeze(0)


class SearchMethod(Protocol):
    """A way to look for points; a dataclass whose fields are its options."""

    def observe(self, x: Tensor, values: Tensor) -> None:
        """See a batch of samples with their Jacobian norms, in the order of the data."""

    def run(self, landscape: Landscape) -> Search:
        """Search, after all samples were seen."""


class Reservoir:
    """A uniform random subset of a stream (Vitter, 1985, algorithm R), seeded.

    Samples enter in the order of the stream; which ones are kept does not depend on the batches.
    """

    def __init__(self, limit: int, seed: int) -> None:
        self._limit = limit
        self._generator = torch.Generator(device="cpu").manual_seed(seed)
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """See a batch."""
        for sample in x:
            self._seen += 1
            if len(self._kept) < self._limit:
                self._kept.append(sample.clone())
                continue
            place = int(torch.randint(self._seen, (), generator=self._generator, device="cpu"))
            if place < self._limit:
                self._kept[place] = sample.clone()

    def samples(self) -> Tensor:
        """The subset, (n, D...)."""
        return torch.stack(self._kept)


class Best:
    """The points with the largest values seen so far."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.points: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def values(self) -> Tensor:
        """Jacobian norms at the points, largest first: float64, on their device."""
        assert self._values is not None
        return self._values

    def add(self, x: Tensor, values: Tensor) -> None:
        """See a batch."""
        points, values = x.detach(), values.detach().double()
        if self.points is not None:
            points, values = torch.cat([self.points, points]), torch.cat([self.values, values])
        # A derivative that is not a number is no candidate.
        order = torch.nan_to_num(values, nan=-1.0).argsort(descending=True, stable=True)
        order = order[: self._limit]
        self.points, self._values = points[order].clone(), values[order]

    def result(self, method: str, norm: Norm) -> Search:
        """The points, best first, and the estimate."""
        assert self.points is not None
        return search_result(self.points, self.values, method, norm, _DERIVATIVE)


def search_result(points: Tensor, values: Tensor, method: str, norm: Norm, reason: str) -> Search:
    """Points, best first, and the estimate: 0 where there are none; not certified for `reason`."""
    value = float(values[0]) if len(values) else 0.0
    estimate = Estimate(value, log_down(value), "lower", norm, method, False, reason)
    return Search(estimate, points, values)


def check_count(value: object, name: str, most: float = math.inf) -> None:
    """An option that counts something.

    Raises:
        ArgumentError: it is not a positive integer, or more than `most`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"{name} must be a positive integer, got {value!r}")
    if int(value) > most:
        raise ArgumentError(f"{name} must be at most {most:g}, which is more than anyone waits for")


def check_positive(value: object, name: str) -> None:
    """An option that is a length.

    Raises:
        ArgumentError: it is not a positive finite number.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
        raise ArgumentError(f"{name} must be a positive number, got {value!r}")


def box_of(box: object) -> Box:
    """What was given as ``box=(low, high)``; an end may be infinite.

    Raises:
        ArgumentError: it is not two numbers (or tensors of a sample's shape), low below high.
    """
    if not isinstance(box, (tuple, list)) or len(box) != 2:
        raise ArgumentError(f"box must be (low, high), got {box!r}")
    low, high = (torch.as_tensor(end, dtype=torch.float64, device="cpu") for end in box)
    if not bool((low < high).all()):
        raise ArgumentError("box must be (low, high) with low < high everywhere")
    # A Box is finite; in float32 these ends are infinite again.
    largest = torch.finfo(torch.float64).max
    return Box(low.clamp(-largest, largest), high.clamp(-largest, largest))


def require_inside(x: Tensor, domain: Domain | None) -> None:
    """Samples that a search starts from must lie in the domain, or their maximum would not count.

    Raises:
        ArgumentError: the domain does not fit the samples, or one lies outside.
    """
    if domain is not None and not bool(domain.contains(x).all()):
        raise ArgumentError(
            "domain: some samples lie outside, and a search starts from them; give a domain that "
            "holds the data"
        )
