"""The Lipschitz constant of networks with one hidden layer of ReLU, from patterns of active units.

Every Jacobian of such a network is ``V diag(s) U`` with a pattern s of zeros and ones, so the
largest norm over all patterns is an upper bound of the Lipschitz constant. Where the rows of U are
linearly independent every pattern belongs to some input, and it is the constant itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError

MOST_UNITS = 16
# Numbers in a stretch of matrices.
_MOST_NUMBERS = 1 << 21
# Singular values below this part of the largest count as zero: rounding is 1e-16 of it.
_RANK = 1e-9
_STEPS = 100
# How wide a kink is at first, in parts of the mean of |U x + b|, and how many times narrower it
# is at last.
_FIRST_WIDTH, _NARROWER = 0.5, 50.0


@dataclass(frozen=True)
class OneHiddenLayer:
    """``f(x) = V relu(U x + b) + c`` in float64.

    Attributes:
        inner: U, (n, d).
        bias: b, (n,).
        outer: V, (k, n).
    """

    inner: Tensor
    bias: Tensor
    outer: Tensor

    @staticmethod
    def of(model: nn.Module) -> OneHiddenLayer | None:
        """Read a module; None where it is another kind of network.

        Example:
            >>> OneHiddenLayer.of(nn.Sequential(nn.Linear(3, 4), nn.Tanh())) is None
            True
        """
        kinds = [type(layer) for layer in model.children()]
        if not isinstance(model, nn.Sequential) or kinds != [nn.Linear, nn.ReLU, nn.Linear]:
            return None
        weights = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
        inner = weights["0.weight"]
        return OneHiddenLayer(
            inner, weights.get("0.bias", inner.new_zeros(len(inner))), weights["2.weight"]
        )

    def squares(self, patterns: Tensor) -> Tensor:
        """``||V diag(s) U||^2`` of patterns (B, n), float64 (B,); differentiable."""
        at_once = max(_MOST_NUMBERS // self.outer.numel(), 1)
        return torch.cat([self._squares(chunk) for chunk in torch.split(patterns, at_once)])

    def _squares(self, patterns: Tensor) -> Tensor:
        jacobians = self.outer * patterns.unsqueeze(1) @ self.inner
        squares: Tensor = torch.linalg.eigvalsh(jacobians @ jacobians.mT)[:, -1]
        return squares


def largest_pattern(network: OneHiddenLayer) -> tuple[float, Tensor]:
    """``max_s ||V diag(s) U||`` over all 2^n patterns s, and a pattern (n,) that has it.

    Computed in float64, so it is off by some 1e-14 of itself.

    Args:
        network: of at most `MOST_UNITS` units.

    Raises:
        ArgumentError: it has more.

    Example:
        >>> eye = torch.eye(2, dtype=torch.float64)
        >>> largest_pattern(OneHiddenLayer(eye, torch.zeros(2), torch.ones(1, 2).double()))
        (1.4142135623730951, tensor([1., 1.], dtype=torch.float64))
    """
    units = len(network.bias)
    if units > MOST_UNITS:
        raise ArgumentError(f"{units} units have 2^{units} patterns; at most {MOST_UNITS} units")
    numbers = torch.arange(1 << units)
    patterns = (numbers.unsqueeze(1) >> torch.arange(units) & 1).double()
    squares = network.squares(patterns)
    best = int(squares.argmax())
    return math.sqrt(float(squares[best])), patterns[best]


def every_pattern_has_an_input(network: OneHiddenLayer) -> bool:
    """Whether the rows of U are linearly independent: then U x + b takes every value."""
    units, inputs = network.inner.shape
    values = torch.linalg.svdvals(network.inner)
    return units <= inputs and bool(values[-1] > _RANK * values[0])


def input_of(network: OneHiddenLayer, pattern: Tensor) -> Tensor:
    """An input (d,) at which ``U x + b`` is 1 where the pattern is and -1 elsewhere.

    The least-squares solution, where there is none.
    """
    point: Tensor = torch.linalg.pinv(network.inner) @ (2 * pattern - 1 - network.bias)
    return point


def smoothed_ascent(network: OneHiddenLayer, starts: Tensor, steps: int = _STEPS) -> Tensor:
    """Climb on the Jacobian norm with kinks that are wide at first and narrow at last.

    The derivative of ReLU is a step, so the Jacobian norm has no gradient to follow. With
    ``sigmoid(z / w)`` in its place it has, and w falls to a hundredth of |z|'s mean. Adam on the
    logarithm of the smoothed norm. What it finds is worth what the norm there is.

    Args:
        network: what to climb on.
        starts: (B, d).
        steps: of every start.

    Returns:
        Points (B, d), float64.
    """
    points = starts.double().clone().requires_grad_()
    optimizer = torch.optim.Adam([points], lr=0.2)
    for step in range(steps):
        values = points @ network.inner.mT + network.bias
        width = _FIRST_WIDTH * _NARROWER ** (-step / steps)
        scales = width * values.detach().abs().mean(dim=1, keepdim=True).clamp_min(1e-300)
        squares = network.squares(torch.sigmoid(values / scales))
        optimizer.zero_grad()
        (-squares.clamp_min(1e-300).log().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return points.detach()
