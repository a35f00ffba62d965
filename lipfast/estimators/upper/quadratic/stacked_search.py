"""A search for multipliers of many chains at once, for which a device is never waited for.

No part of a proof. Every network does the same work: what one accepts and another does not is
chosen entry by entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.stacked_sweep import (
    MultiplierChoice,
    StackedChains,
    largest_beside,
    stacked_sweep,
    value_and_gradient,
)

# Squarings of the smoothed maximum, for searches of so many times ten evaluations.
_STAGES = ((4,), (4, 6), (4, 6, 8))
# Of steps in log D: the first, the longest, and how many are remembered.
_FIRST_STEP, _LONGEST_STEP, _HISTORY = 0.3, 2.0, 8
# Estimates of largest eigenvalues are too small, seldom by more than this.
_ESTIMATE_ROOM = 1.001
# By how much multipliers grow where D - K has no factor, one after the other.
_GROWTHS = 1.03, 1.1, 4.0
# Beside the largest of a layer.
_LEAST_SHAPE = 1e-6
# Of 1 + |m| / r: units of known slope have r = 0.
_WIDEST = 1e3
# Above the start, in log D.
_MOST_ABOVE_START = 9.0
_LEAST_STEP = 1e-300


def closed_form(chains: StackedChains, share: float) -> Tensor:
    r"""Log D, (N, units), feasible but for accidents: `closed_form` of the reference, estimated.

    Args:
        chains: N of them.
        share: of $|m| / r$ in its factor. With 1 the bound is at most the product of norms; where
            only a few directions come near the norms of the layers, less is better.
    """

    def choose(layer: int, below: Tensor) -> Tensor:
        columns = chains.weights[layer + 1].norm(dim=-2)
        shape = _roots(below) / torch.maximum(columns, _largest_of_rows(columns) * _LEAST_SHAPE)
        shape = torch.maximum(shape, _largest_of_rows(shape) * _LEAST_SHAPE)
        shape = torch.where((shape > 0) & (shape < torch.inf), shape, 1.0)
        factor = (1 + share * (_closed_form_factor(chains, layer) - 1)).clamp_min(1 + 1e-5)
        d = factor * _ESTIMATE_ROOM * shape * largest_beside(below, shape)[:, None]
        return torch.where(d > 0, d, 2.0**-100)

    return _feasible(chains, choose)


def from_earlier(chains: StackedChains, multipliers: Sequence[Tensor]) -> Tensor:
    """Log D of multipliers of similar networks, made larger layer by layer where D > K fails."""

    def choose(layer: int, below: Tensor) -> Tensor:
        known = multipliers[layer]
        top = largest_beside(below, known)[:, None]
        return known * (_ESTIMATE_ROOM * top).clamp_min(1.0)

    return _feasible(chains, choose)


def _closed_form_factor(chains: StackedChains, layer: int) -> Tensor:
    """1 + |m| / r, of units of known slope a large number in the place of infinity."""
    mean, product = chains.means[layer], chains.products[layer]
    square = mean.square() if product is None else mean.square() - product
    return (1 + mean.abs() / square.clamp_min(_LEAST_STEP).sqrt()).clamp_max(_WIDEST)


def _roots(below: Tensor) -> Tensor:
    return below.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()


def _largest_of_rows(rows: Tensor) -> Tensor:
    return rows.amax(-1, keepdim=True)


def _feasible(chains: StackedChains, choose: MultiplierChoice) -> Tensor:
    """What is chosen layer by layer, larger where it is too small."""
    chosen = []

    def feasible(layer: int, below: Tensor) -> Tensor:
        d = choose(layer, below)
        for growth in _GROWTHS:
            info = torch.linalg.cholesky_ex(torch.diag_embed(d) - below)[1]
            d = torch.where(info[:, None] != 0, growth * d, d)
        chosen.append(d)
        return d

    stacked_sweep(chains, feasible)
    return torch.cat(chosen, 1).log()


class _State(NamedTuple):
    """Where the search of each network is.

    Attributes:
        logs: log D, (N, units).
        value: there, (N,).
        gradient: (N, units).
        steps: the last ones, (N, pairs, units), the last one last; zeros where there are fewer.
        turns: how the gradient changed in them.
    """

    logs: Tensor
    value: Tensor
    gradient: Tensor
    steps: Tensor
    turns: Tensor


def stacked_search(chains: StackedChains, logs: Tensor, evaluations: int) -> Tensor:
    """L-BFGS on log D from feasible multipliers (Nocedal, 1980), as `search` of the reference.

    Args:
        chains: N of them.
        logs: log D, (N, units). Where they are not feasible, they come back.
        evaluations: sweeps.
    """
    # Where multipliers want to be infinite, differences of large numbers would be what is left.
    factors = (_closed_form_factor(chains, layer) for layer in range(len(chains.sizes)))
    most = torch.cat([own.log().expand(len(logs), -1) for own in factors], 1)
    most = logs + _MOST_ABOVE_START - most
    left = evaluations
    stages = _STAGES[min(max(evaluations // 10, 1), len(_STAGES)) - 1]
    for stage, squarings in enumerate(stages):
        share = left // (len(stages) - stage)
        left -= share
        none = torch.zeros_like(logs)[:, None].expand(-1, _HISTORY, -1)
        value, gradient = value_and_gradient(chains, logs, squarings)
        state = _State(logs, value, gradient, none, none)
        logs = _descended(chains, state, most, share - 1, squarings).logs
    return logs


def best_start(chains: StackedChains, starts: Sequence[Tensor]) -> Tensor:
    """Whichever gives the smallest value, network by network."""
    best, least = starts[0], value_and_gradient(chains, starts[0], _STAGES[0][0])[0]
    for logs in starts[1:]:
        value = value_and_gradient(chains, logs, _STAGES[0][0])[0]
        best = torch.where((value < least)[:, None], logs, best)
        least = torch.where(value < least, value, least)
    return best


def _descended(
    chains: StackedChains, state: _State, most: Tensor, evaluations: int, squarings: int
) -> _State:
    length = torch.ones_like(state.value)
    for _ in range(evaluations):
        move = _stacked_direction(state)
        slope = (state.gradient * move).sum(1)
        trial = torch.minimum(state.logs + length[:, None] * move, most)
        value, gradient = value_and_gradient(chains, trial, squarings)
        taken = value <= state.value + 1e-4 * length * slope
        shorter = length * torch.where(value < torch.inf, 0.5, 0.3)
        length = torch.where(taken, 1.0, shorter)
        state = _one_step(state, trial, value, gradient, taken)
    return state


def _one_step(
    state: _State, trial: Tensor, value: Tensor, gradient: Tensor, taken: Tensor
) -> _State:
    step, turn = trial - state.logs, gradient - state.gradient
    bent = (step * turn).sum(1) > 1e-10 * step.norm(dim=1) * turn.norm(dim=1)
    kept = (taken & bent)[:, None, None]
    row = taken[:, None]
    return _State(
        torch.where(row, trial, state.logs),
        torch.where(taken, value, state.value),
        torch.where(row, gradient, state.gradient),
        torch.where(kept, torch.cat([state.steps[:, 1:], step[:, None]], 1), state.steps),
        torch.where(kept, torch.cat([state.turns[:, 1:], turn[:, None]], 1), state.turns),
    )


def _stacked_direction(state: _State) -> Tensor:
    r"""Minus the gradient times the inverse Hessian that the last steps make.

    With S the steps, Y the turns, R the upper triangle of $S Y^T$, E its diagonal and $\gamma =
    s y / y y$ of the last pair, that inverse is $\gamma I + S^T (R^{-T} (E + \gamma Y Y^T) R^{-1}
    S - \gamma R^{-T} Y) - \gamma Y^T R^{-1} S$ (Byrd, Nocedal and Schnabel, 1994, theorem 2.2).
    """
    steps, turns, gradient = state.steps, state.turns, state.gradient
    inner, squares = steps @ turns.mT, turns @ turns.mT
    bends = inner.diagonal(dim1=-2, dim2=-1)
    # Pairs that are not there are rows of zeros, and stay out of the way with ones here.
    upper = inner.triu() + torch.diag_embed((bends == 0).to(inner.dtype))
    known = bends[:, -1] > 0
    first = _FIRST_STEP / gradient.abs().amax(1).clamp_min(_LEAST_STEP)
    last = bends[:, -1] / squares[:, -1, -1].clamp_min(_LEAST_STEP)
    scale = torch.where(known, last, first)[:, None]
    sides = torch.stack([steps, turns], 1) @ gradient[:, None, :, None]
    along, across = sides[:, 0], scale[..., None] * sides[:, 1]
    solved = torch.linalg.solve_triangular(upper, along, upper=True)
    weighted = bends[..., None] * solved + scale[..., None] * (squares @ solved) - across
    back = torch.linalg.solve_triangular(upper.mT, weighted, upper=False)
    product = (steps.mT @ back)[..., 0] - scale * (turns.mT @ solved)[..., 0]
    move = -(scale * gradient + product)
    # Rounding may turn it upwards.
    downwards = ((move * gradient).sum(1) < 0)[:, None]
    move = torch.where(downwards, move, -first[:, None] * gradient)
    longest = move.abs().amax(1, keepdim=True)
    return move * (_LONGEST_STEP / longest.clamp_min(_LEAST_STEP)).clamp_max(1.0)
