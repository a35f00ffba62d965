"""Searches for large Jacobian norms beyond the data: what they share. One method per file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.estimate import Estimate, log_down
from lipfast.estimators.jacobian.function import Function, SampleFunction
from lipfast.estimators.results import Search
from lipfast.norms import Norm

# Points that a search returns.
KEPT = 8
_NOT_PROVED = "a derivative in floating point; the certified value is a difference quotient near it"


@dataclass(frozen=True)
class Landscape:
    """What a search may evaluate.

    Attributes:
        norms: Jacobian norms (B,) at points (B, D...).
        function: the model, (B, D...) -> (B, K).
        outputs: K.
        constants: the tensors that the function holds.
        module: the model itself.
        example: one sample of each input of the module.
        norm: 1, 2 or inf.
        memory: bytes for intermediate results.
        seed: of random numbers.
        advance: to be told how many evaluations are done.
    """

    norms: Callable[[Tensor], Tensor]
    function: Function
    outputs: int
    constants: tuple[Tensor, ...]
    module: nn.Module
    example: tuple[Tensor, ...]
    norm: Norm
    memory: int
    seed: int
    advance: Callable[[int], None]

    def problem(self, x: Tensor) -> SampleFunction:
        """The model at some points."""
        return SampleFunction(self.function, x, self.outputs, self.constants)


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
        self.values = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor, values: Tensor) -> None:
        """See a batch."""
        values = values.detach().double().cpu()
        points = x.detach() if self.points is None else torch.cat([self.points, x.detach()])
        values = torch.cat([self.values, values])
        # A derivative that is not a number is no candidate.
        order = torch.nan_to_num(values, nan=-1.0).argsort(descending=True, stable=True)
        order = order[: self._limit]
        self.points, self.values = points[order].clone(), values[order]

    def result(self, method: str, norm: Norm) -> Search:
        """The points, best first, and the estimate."""
        assert self.points is not None
        value = float(self.values[0])
        estimate = Estimate(
            value, log_down(value), "lower", norm, method, certified=False, reason=_NOT_PROVED
        )
        return Search(estimate, self.points.cpu(), self.values)


def check_count(value: object, name: str) -> None:
    """An option that counts something.

    Raises:
        ArgumentError: it is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name} must be a positive integer, got {value!r}")


def check_positive(value: object, name: str) -> None:
    """An option that is a length.

    Raises:
        ArgumentError: it is not a positive finite number.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < float(value) < float("inf"):  # type: ignore[arg-type]
        raise ArgumentError(f"{name} must be a positive number, got {value!r}")


Box = tuple[float | Tensor, float | Tensor] | Sequence[float | Tensor]


def check_box(box: Box | None) -> tuple[Tensor, Tensor] | None:
    """Lower and upper ends of the allowed values.

    Raises:
        ArgumentError: they are not two numbers (or tensors of a sample's shape), low below high.
    """
    if box is None:
        return None
    if not isinstance(box, (tuple, list)) or len(box) != 2:
        raise ArgumentError(f"box must be (low, high), got {box!r}")
    low, high = (torch.as_tensor(end, dtype=torch.float64, device="cpu") for end in box)
    if not bool((low < high).all()):
        raise ArgumentError("box must be (low, high) with low < high everywhere")
    return low, high


def into_box(x: Tensor, box: tuple[Tensor, Tensor] | None) -> Tensor:
    """The nearest points of the box."""
    if box is None:
        return x
    low, high = (end.to(x) for end in box)
    return torch.minimum(torch.maximum(x, low), high)


def require_inside(x: Tensor, box: tuple[Tensor, Tensor] | None) -> None:
    """Samples must lie in the box, or the data's own maximum would not count there.

    Raises:
        ArgumentError: the box does not fit the samples, or one lies outside.
    """
    if box is None:
        return
    try:
        inside = (into_box(x, box) == x).flatten(1).all(1)
    except RuntimeError as error:
        raise ArgumentError(
            f"box: its ends do not fit samples of shape {tuple(x.shape[1:])}: {error}"
        ) from error
    if not bool(inside.all()):
        raise ArgumentError("box: some samples lie outside; give a box that holds the data")
