"""What a quadratic constraint says of slopes: one parabola that is not positive on their range.

Part of the proof of every bound by quadratic constraints: a slope of a range satisfies its
constraint in real arithmetic, whatever rounding did to the two numbers that stand for the range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF


class Boxes(NamedTuple):
    r"""Ranges of slopes as constraints $\sigma^2 - 2 m \sigma + p \le 0$.

    Attributes:
        means: m, about the middle of the range.
        products: p, at most the product of its ends.
    """

    means: Tensor
    products: Tensor


def boxes_of(lower: Tensor, upper: Tensor) -> Boxes:
    r"""The constraint that all slopes between two float64 numbers satisfy.

    A convex parabola is not positive between two points where it is not: $p \le \min(\alpha (2 m -
    \alpha), \beta (2 m - \beta))$ is all that is asked, for whatever m. With $2 m = (\alpha +
    \beta)(1 + \delta)$, $|\delta| \le u$, and $M = \max(|\alpha|, |\beta|)$ that is at least
    $\alpha \beta - u M (|\alpha| + |\beta|)$, but for an underflow of m, which moves it by less
    than $2^{-1074} M$. The computed product is within u of $\alpha \beta$, relative, or
    $2^{-1075}$; the two roundings of the subtraction are each within $2 u M (|\alpha| + |\beta|)$
    of what they round, so that 8 times that and `UNDERFLOW` are enough. Where $2 m$ is the sum
    itself, $\alpha \beta$ rounded down is right, and where an end is 0 the product is 0.

    Args:
        lower: $\alpha$, finite, at most 2^500 in size.
        upper: $\beta \ge \alpha$, alike.

    Example:
        >>> relu = boxes_of(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        >>> relu.means.item(), relu.products.item()
        (0.5, 0.0)
    """
    total = lower + upper
    means = total / 2
    # The error of the sum (Knuth, 1969), and whether halving it was exact.
    rest = total - lower
    error = (lower - (total - rest)) + (upper - rest)
    exact = (error == 0) & (means * 2 == total)
    product = lower * upper
    below = torch.nextafter(product, torch.full_like(product, -torch.inf))
    size = torch.maximum(lower.abs(), upper.abs()) * (lower.abs() + upper.abs())
    wide = product - (8 * UNIT_ROUNDOFF * size + UNDERFLOW)
    right = torch.where((lower == 0) | (upper == 0), torch.zeros_like(product), below)
    return Boxes(means, torch.where(exact, right, wide))
