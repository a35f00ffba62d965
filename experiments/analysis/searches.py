"""Lower bounds beyond the training samples: S*, pairs, dense grids, ascent."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError

_BLOCK = 1 << 14


def effective_lower_bound(
    model: nn.Module, x_train: Tensor, x_test: Tensor, *, draws: int = 2000, seed: int = 0
) -> float:
    """``max ||J(x)||_2`` over S*: training and test samples and their convex combinations.

    Section 3.1 and appendix 2.6.8: S* holds ``w x_i + (1 - w) x_j`` for random pairs within the
    training and within the test set and w in .1, .2, .3, .4, .5. Never below C_lower. A lower
    estimate of the Lipschitz constant, not certified.

    Args:
        model: in eval mode, (B, D...) -> (B, K).
        x_train: (B, D...).
        x_test: (B', D...).
        draws: combinations within each of the two sets.
        seed: of the pairs.
    """
    values = []
    for x in (x_train, x_test):
        found = lipfast.lower_bound(model, x, search="convex", draws=draws, seed=seed).search
        assert found is not None
        values.append(found.estimate.value)
    return max(values)


def pairwise_lower_bound(model: nn.Module, x: Tensor, *, limit: int = 2000, seed: int = 0) -> float:
    """``max_{i != j} ||f(x_i) - f(x_j)||_2 / ||x_i - x_j||_2``: the study's C_alt.lower.

    Section 2 and appendix 2.1; O(B^2) pairs. It may lie below C_lower.

    Args:
        model: in eval mode, (B, D...) -> (B, K).
        x: (B, D...), at least two different samples.
        limit: samples compared, a random subset where there are more.
        seed: of the subset.
    """
    found = lipfast.lower_bound(model, x, search="pairs", limit=limit, seed=seed).search
    assert found is not None
    return found.estimate.value


def ascended_lower_bound(
    model: nn.Module, x: Tensor, *, steps: int = 50, starts: int = 8, seed: int = 0
) -> float:
    """``max ||J(x)||_2`` after projected gradient ascent from the best samples.

    Beyond the study, which names better lower bounds as open. Never below C_lower.

    Args:
        model: in eval mode, (B, D...) -> (B, K).
        x: (B, D...).
        steps: of each ascent.
        starts: samples to start from.
        seed: of random steps where the norm is locally constant.
    """
    found = lipfast.lower_bound(
        model, x, search="ascent", steps=steps, starts=starts, seed=seed
    ).search
    assert found is not None
    return found.estimate.value


def grid_points(low: float, high: float, per_axis: int) -> Tensor:
    """Points of a regular grid on ``[low, high]^2``, ends included.

    Returns:
        (per_axis^2, 2), float32, the first coordinate varying slowest.

    Raises:
        ArgumentError: low is not below high, or there are fewer than two points per axis.

    Example:
        >>> grid_points(0.0, 1.0, 2).tolist()
        [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    """
    if not low < high or per_axis < 2:
        raise ArgumentError(
            f"a grid needs low < high and two points per axis, got {low}, {high}, {per_axis}"
        )
    axis = torch.linspace(low, high, per_axis)
    return torch.cartesian_prod(axis, axis)


def grid_norms(model: nn.Module, low: float, high: float, per_axis: int) -> Tensor:
    """``||J(x)||_2`` on a dense grid of the plane (section 3.3 and appendix 2.6.1).

    The maximum is a lower bound on the Lipschitz constant that no choice of samples beats once the
    grid is dense: for a piecewise linear network the norm is constant on polygons, and only
    polygons that fall between grid points are missed.

    Args:
        model: in eval mode, (B, 2) -> (B, K).
        low: smallest coordinate.
        high: largest coordinate.
        per_axis: points per axis.

    Returns:
        (per_axis, per_axis); row i holds points whose first coordinate is the i-th of the axis.
    """
    points = grid_points(low, high, per_axis)
    norms = [lipfast.jacobian_norms(model, part) for part in torch.split(points, _BLOCK)]
    return torch.cat(norms).reshape(per_axis, per_axis)
