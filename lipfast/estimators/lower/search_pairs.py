"""Difference quotients between samples: the study's `alt` estimate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import model_function
from lipfast.estimators.lower.search import (
    KEPT,
    Landscape,
    Reservoir,
    check_count,
    search_result,
)
from lipfast.estimators.results import Search
from lipfast.norms import Norm

_BLOCK = 512
# Closer pairs, relative to the samples' size, differ by little more than the rounding of the data.
_CLOSEST = 1e-6


@dataclass
class Pairs:
    """``||f(a) - f(b)|| / ||a - b||`` for all pairs of up to `limit` samples, in float64.

    A lower bound of its own kind (`alt` of Khromov and Singh, ICLR 2024): it may lie below the
    largest Jacobian norm. Pairs closer than 1e-6 of the largest sample are left out.

    Attributes:
        limit: samples that are compared, a random subset of the data.
        seed: of the random subset.
    """

    limit: int = 2000
    seed: int = 0
    _pool: Reservoir = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_count(self.limit, "limit")
        if self.limit < 2:
            raise ArgumentError("limit must be at least 2: a pair of samples")
        self._pool = Reservoir(self.limit, self.seed)

    def observe(self, x: Tensor, values: Tensor) -> None:
        """Keep some samples."""
        self._pool.add(x)

    def run(self, landscape: Landscape) -> Search:
        """Compare all of them with each other."""
        x = self._pool.samples().double()
        if len(x) < 2:
            raise ArgumentError("search='pairs' needs at least two samples")
        wide_model = model_function(landscape.module, landscape.example, dtype=torch.float64)
        with wide_model as wide, torch.no_grad():
            y = torch.cat([wide.function(part) for part in torch.split(x, _BLOCK)])
        flat = x.reshape(len(x), -1)
        closest = _CLOSEST * float(torch.linalg.vector_norm(flat, landscape.norm, dim=1).max())
        first, second = _candidates(flat, y, landscape, closest)
        top = _quotients(flat, y, first, second, landscape.norm)
        order = top.argsort(descending=True, stable=True)[:KEPT]
        reason = "rounding of the model's float64 evaluation is not accounted for"
        if not len(order):
            reason = "all samples are the same point"
        label = f"maximum difference quotient over pairs of {len(x)} samples"
        points = torch.stack([x[first[order]], x[second[order]]], 1)
        return search_result(points, top[order], label, landscape.norm, reason)


def _candidates(
    x: Tensor, y: Tensor, landscape: Landscape, closest: float
) -> tuple[Tensor, Tensor]:
    """The best pairs of each block; distances through a matrix product, good enough to choose."""
    first, second = [], []
    for start in range(0, len(x), _BLOCK):
        rows = slice(start, start + _BLOCK)
        apart = torch.cdist(x[rows], x, p=landscape.norm)
        ratio = torch.cdist(y[rows], y, p=landscape.norm) / apart
        own = torch.arange(start, start + len(ratio), device=x.device)
        again = torch.arange(len(x), device=x.device) <= own[:, None]  # each pair once
        ratio[again | (apart <= closest) | ratio.isnan()] = -math.inf
        values, where = ratio.flatten().topk(min(KEPT, ratio.numel()))
        where = where[values > -math.inf]
        first.append(start + where // len(x))
        second.append(where % len(x))
        landscape.advance(len(ratio))
    return torch.cat(first), torch.cat(second)


def _quotients(x: Tensor, y: Tensor, first: Tensor, second: Tensor, norm: Norm) -> Tensor:
    change = torch.linalg.vector_norm(y[first] - y[second], norm, dim=1)
    quotients: Tensor = change / torch.linalg.vector_norm(x[first] - x[second], norm, dim=1)
    return quotients
