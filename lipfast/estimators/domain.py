"""Convex sets of inputs: where a bound is asked for, if not everywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.rounding import UNIT_ROUNDOFF, gamma


def _float64(value: float | Tensor) -> Tensor:
    """In float64; a number lies on the CPU, whatever torch's default device is."""
    try:
        if isinstance(value, Tensor):
            if value.is_meta or value.is_complex():
                raise TypeError("no real numbers")
            return value.to(torch.float64)
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"the limits or the middle of a domain are numbers or tensors of them, not {value!r}"
        ) from error


def _limit_like(points: Tensor, value: float | Tensor) -> Tensor:
    """In the points' dtype, on their device."""
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=points.dtype, device="cpu")
    return sent(value.to(points.dtype), points.device)


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
        try:
            crossed = bool((low > high).any())
        except RuntimeError as error:
            raise ArgumentError(
                f"the limits of a Box have shapes {tuple(low.shape)} and {tuple(high.shape)}, "
                "which do not broadcast"
            ) from error
        if crossed:
            raise ArgumentError("the lower limit of a Box exceeds the upper one")

    def _limits(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        low = _float64(self.low)
        high = _float64(self.high)
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
        low, high = (_limit_like(points, limit) for limit in (self.low, self.high))
        return torch.minimum(torch.maximum(points, low), high)

    def contains(self, points: Tensor) -> Tensor:
        """Which points (B, *shape) lie inside, (B,); the limits rounded to the points' dtype.

        Raises:
            ArgumentError: the limits do not fit the points.
        """
        try:
            return (self.project(points) == points).reshape(len(points), -1).all(1)
        except RuntimeError as error:
            raise ArgumentError(
                f"the limits of a Box do not fit samples {tuple(points.shape[1:])}"
            ) from error

    def flattened(self, shapes: Sequence[tuple[int, ...]]) -> Box:
        """The box of inputs of these shapes, flattened and joined."""
        low, high = zip(*(self._limits(shape) for shape in shapes), strict=True)
        return Box(_joined_vector(low), _joined_vector(high))


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
        try:
            valid = math.isfinite(self.radius) and self.radius >= 0
        except (TypeError, ValueError):
            valid = False
        if not valid:
            raise ArgumentError(f"the radius of a Ball must be a number >= 0, not {self.radius}")
        if not bool(torch.isfinite(_float64(self.centre)).all()):
            raise ArgumentError("the middle of a Ball must be finite")

    def middle(self, shape: tuple[int, ...]) -> Tensor:
        """The middle, a float64 tensor of a sample's shape."""
        try:
            return _float64(self.centre).expand(shape)
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
        r"""Points inside, next to the nearest ones, for points (networks, C, \*shape).

        With c the centre, o = fl(p - c), t the computed factor and u the unit roundoff, the result
        y = fl(c + fl(t o)) has $|y_i - c_i| \le (1 + u)^2 |t o_i| + u |c_i|$ but for underflow,
        since $|c_i + fl(t o_i)|$ is at most $|c_i| + (1 + u)|t o_i|$. So
        $\|y - c\| \le (1 + 3u) t \|o\| + u \|c\|$, and $t \|o\| \le r (1 - s) - 2u\|c\|$ is enough
        with $s = 10^{-9} + 4\gamma_{n+8}$, which covers the roundings of $\|o\|$, t and the limit.
        Points that stay have t = 1. Where nothing is left of the radius all become the centre.

        Points in a narrower dtype with unit roundoff v move in float64 and are rounded to it, by at
        most $v (\|c\| + r)$ but for underflow: the limit leaves room for twice that.
        """
        narrow = points.dtype != torch.float64
        rounding = torch.finfo(points.dtype).eps if narrow else 0.0
        whole = sent(_float64(self.centre), points.device).expand(points.shape[2:])
        underflow = whole.numel() * torch.finfo(points.dtype).tiny if narrow else 2.0**-1000
        offset = points.double() - whole
        length = _length(offset.reshape(*points.shape[:2], -1))
        room = (2.0 * UNIT_ROUNDOFF + rounding) * _length(whole.flatten()) + underflow
        slack = 1e-9 + 4 * gamma(whole.numel() + 8) + rounding
        limit = self.radius * (1.0 - slack) - room * (1.0 + slack)
        factor = torch.where(length > limit, length.reciprocal() * limit, 1.0)
        moved = whole + offset * factor.reshape(*factor.shape, *[1] * (points.dim() - 2))
        return torch.where(limit > 0.0, moved, whole).to(points.dtype)

    def contains(self, points: Tensor) -> Tensor:
        """Which points (B, *shape) lie inside, (B,), up to the rounding of the points' dtype."""
        centre = sent(self.middle(tuple(points.shape[1:])), points.device).flatten()
        distance = _length(points.double().reshape(len(points), -1) - centre)
        rounding = torch.finfo(points.dtype).eps
        return distance <= self.radius + rounding * (self.radius + _length(centre))

    def flattened(self, shapes: Sequence[tuple[int, ...]]) -> Ball:
        """The ball of inputs of these shapes, flattened and joined."""
        return Ball(self.radius, _joined_vector([self.middle(shape) for shape in shapes]))


def _length(vectors: Tensor) -> Tensor:
    """Euclidean norm along the last dimension, scaled, so that no square leaves float64."""
    peak = vectors.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak, torch.ones_like(peak))
    length: Tensor = torch.linalg.vector_norm(vectors / scale, dim=-1)
    return length * scale.squeeze(-1)


def _joined_vector(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


Domain = Box | Ball


def check_domain(domain: object, shapes: Sequence[tuple[int, ...]] = ()) -> None:
    """A domain is None, a `Box` or a `Ball`, and fits samples of these shapes.

    Raises:
        ArgumentError: it is something else, or does not fit.
    """
    if domain is None:
        return
    if not isinstance(domain, (Box, Ball)):
        raise ArgumentError(
            f"domain must be lipfast.Box(low, high) or lipfast.Ball(radius, centre), not {domain!r}"
        )
    for shape in shapes:
        domain.middle(shape)
