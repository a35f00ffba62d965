"""Convex sets of inputs: where a bound is asked for, if not everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.rules.registry import Norm
from lipfast.rules.rounding import gamma


def _wide(value: float | Tensor) -> Tensor:
    """In float64; a number lies on the CPU, whatever torch's default device is."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Box:
    """Inputs with ``low <= x_i <= high``; numbers, or tensors that broadcast to a sample.

    Raises:
        ArgumentError: not finite, or `low` exceeds `high`.

    Examples:
        >>> import lipfast
        >>> lipfast.Box(0, 1)
        Box(low=0, high=1)
    """

    low: float | Tensor
    high: float | Tensor

    def __post_init__(self) -> None:
        low, high = self._limits(())
        if not (bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())):
            raise ArgumentError("the limits of a Box must be finite")
        if bool((low > high).any()):
            raise ArgumentError("the lower limit of a Box exceeds the upper one")

    def _limits(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        low = _wide(self.low)
        high = _wide(self.high)
        try:
            return low.expand(shape or low.shape), high.expand(shape or high.shape)
        except RuntimeError as error:
            raise ArgumentError(f"the limits of a Box do not fit samples {shape}") from error

    def middle(self, shape: tuple[int, ...]) -> Tensor:
        """The middle, a float64 tensor of a sample's shape."""
        low, high = self._limits(shape)
        return low / 2 + high / 2

    def reach(self, shape: tuple[int, ...], norm: Norm) -> float:
        """Largest distance of a point from `middle`, rounded up."""
        low, high = self._limits(shape)
        centre = self.middle(shape)
        reach = torch.maximum(high - centre, centre - low) * (1.0 + 2.0**-51)
        peak = float(reach.max())
        if peak == 0.0:
            return 0.0
        # Scaled, so that squares do not underflow.
        length = float(torch.linalg.vector_norm((reach / peak).flatten(), norm))
        return length * peak * (1.0 + 2 * gamma(reach.numel() + 8))

    def largest(self, shape: tuple[int, ...]) -> Tensor | None:
        """Largest magnitude of every entry of a sample."""
        low, high = self._limits(shape)
        return torch.maximum(low.abs(), high.abs())

    def project(self, points: Tensor) -> Tensor:
        """The nearest points inside, for points (..., *shape)."""
        low = torch.as_tensor(self.low, dtype=points.dtype, device=points.device)
        high = torch.as_tensor(self.high, dtype=points.dtype, device=points.device)
        return torch.minimum(torch.maximum(points, low), high)


@dataclass(frozen=True, eq=False)
class Ball:
    """Inputs within a Euclidean distance of a centre; all inputs of a model together.

    Raises:
        ArgumentError: the radius is not a finite number >= 0.

    Examples:
        >>> import lipfast
        >>> lipfast.Ball(2.5)
        Ball(radius=2.5, centre=0.0)
    """

    radius: float
    centre: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.radius) and self.radius >= 0):
            raise ArgumentError(f"the radius of a Ball must be a number >= 0, not {self.radius}")
        if not bool(torch.isfinite(_wide(self.centre)).all()):
            raise ArgumentError("the middle of a Ball must be finite")

    def middle(self, shape: tuple[int, ...]) -> Tensor:
        """The middle, a float64 tensor of a sample's shape."""
        try:
            return _wide(self.centre).expand(shape)
        except RuntimeError as error:
            raise ArgumentError(f"the middle of a Ball does not fit samples {shape}") from error

    def reach(self, shape: tuple[int, ...], norm: Norm) -> float:
        """Largest distance of a point from `middle`, rounded up."""
        if norm != 1:
            return float(self.radius)
        return float(self.radius) * math.sqrt(math.prod(shape)) * (1.0 + 2.0**-50)

    def largest(self, shape: tuple[int, ...]) -> Tensor | None:
        """Nothing beyond what `middle` and `reach` say."""
        return None

    def project(self, points: Tensor) -> Tensor:
        """Points inside, next to the nearest ones, for points (networks, C, *shape)."""
        centre = torch.as_tensor(self.centre, dtype=points.dtype, device=points.device)
        offset = points - centre
        length = torch.linalg.vector_norm(offset.flatten(2), dim=2)
        limit = self.radius * (1.0 - 1e-9)
        factor = torch.where(length > limit, limit / length, 1.0)
        return centre + offset * factor.reshape(*factor.shape, *[1] * (points.dim() - 2))


Domain = Box | Ball
