"""A search for multipliers of the quadratic constraints of a graph.

No part of a proof: whatever is found is proved by `graph_certificate`, or not taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lipfast.estimators.upper.quadratic.graph_starts import balanced_choice, multipliers_of_paths
from lipfast.estimators.upper.quadratic.graph_sweep import GraphSweep, Swept

# Half of the evaluations are a fixed point, which needs no line search; if possible, so many.
_FIXED_POINT = 10
# The smoothed largest eigenvalue begins with this power, the trace: all of the outputs count.
_FIRST_POWER = 1.0
_GROWTH = 4.0
_MOMENTUM = 0.3
_PAIRS = 12
_LARGEST_STEP = 2.0
_LEAST_WEIGHT = 1e-9
# log D is kept within this distance of where the search began.
_REACH = 40.0
_ROOMS = (1.0, 1.5, 4.0)


def searched(
    sweep: GraphSweep, evaluations: int, start: Sequence[Tensor] | None = None
) -> Swept | None:
    """The best sweep that was found; None where not even a start is feasible.

    Args:
        sweep: of a network; its shifts are chosen here.
        evaluations: values and gradients after the starts.
        start: log2 of multipliers of a similar network, in its units, or None.
    """
    found = []
    for room in _ROOMS:
        swept = sweep.forward(balanced_choice(sweep.problem, room), rescale=True)
        if swept is not None:
            found.append(swept)
            break
    others: list[list[Tensor]] = []
    by_paths, bound = multipliers_of_paths(sweep.problem)
    # What these give is known before, and a sweep takes time.
    if not found or bound < found[0].root * 2.0 ** sweep.scale(len(by_paths)):
        others.append([own * 4.0 ** -sweep.scale(k) for k, own in enumerate(by_paths)])
    if start is not None:
        others.append([2.0 ** (own - 2 * sweep.scale(k)) for k, own in enumerate(start)])
    for multipliers in others:
        if all(bool((own.isfinite() & (own > 0)).all()) for own in multipliers):
            swept = sweep.forward(multipliers, rescale=not found)
            if swept is not None:
                found.append(swept)
    if not found:
        return None
    best = min(found, key=lambda swept: swept.square)
    # Where the bound is zero already there is no logarithm to descend on.
    if not sweep.problem.steps or not evaluations or not best.square > 0:
        return best
    return _MultiplierSearch(sweep, best).run(evaluations)


class _MultiplierSearch:
    def __init__(self, sweep: GraphSweep, best: Swept) -> None:
        self._sweep, self._best = sweep, best
        self._sizes = [len(own) for own in best.multipliers]
        self._centre = torch.cat(best.multipliers).log()

    def run(self, evaluations: int) -> Swept:
        """A fixed point at first, then a quasi-Newton method, within a number of evaluations."""
        fixed = min(evaluations, max(_FIXED_POINT, evaluations // 2))
        self._fixed_point(fixed)
        if evaluations > fixed:
            self._quasi_newton(evaluations - fixed)
        return self._best

    def _swept(self, logs: Tensor) -> Swept | None:
        inside = torch.maximum(torch.minimum(logs, self._centre + _REACH), self._centre - _REACH)
        swept = self._sweep.forward(list(torch.split(inside.exp(), self._sizes)))
        if swept is not None and swept.square < self._best.square:
            self._best = swept
        return swept

    def _value(self, swept: Swept, power: float) -> tuple[float, Tensor, Tensor]:
        r"""$\log (\mathrm{tr} M^q)^{1/q}$, and both parts of its gradient in log D."""
        values, vectors = torch.linalg.eigh(swept.outputs)
        top = float(values[-1])
        shares = (values / top).clamp_min(0.0)
        total = shares.pow(power).sum()
        weights = shares.pow(power - 1) / (total * top)
        chosen = weights > _LEAST_WEIGHT * weights[-1]
        columns = vectors[:, chosen] * weights[chosen].sqrt()
        taken, given = self._sweep.backward(swept, columns)
        return math.log(top) + math.log(float(total)) / power, torch.cat(taken), torch.cat(given)

    def _fixed_point(self, evaluations: int) -> None:
        r"""$D \leftarrow D (\sum s^2 / \sum (2 m s q - p q^2))^\eta$."""
        logs, eta, last = torch.cat(self._best.multipliers).log(), 0.5, math.inf
        swept: Swept | None = self._best
        step = torch.zeros_like(logs)
        for turn in range(evaluations):
            power = _FIRST_POWER * _GROWTH ** (turn / max(1, evaluations - 1))
            if swept is None or swept.square > last * 1.05:
                eta, step = max(eta / 2, 1 / 16), step / 2
                logs = logs - step
            else:
                last = swept.square
                taken, given = self._value(swept, power)[1:]
                ratio = taken / torch.maximum(given, 1e-3 * taken)
                change = eta * torch.where(taken > 0, ratio, 1.0).log()
                step = change.nan_to_num(0.0) + _MOMENTUM * step
                step = step.clamp(-_LARGEST_STEP, _LARGEST_STEP)
                logs = logs + step
            swept = self._swept(logs)

    def _quasi_newton(self, evaluations: int) -> None:
        """L-BFGS on log D with a larger power in every part (Nocedal, 1980)."""
        parts = max(1, min(3, evaluations // 15))
        for part in range(parts):
            power = 32.0 * 2.0**part
            self._minimise(power, evaluations // parts)

    def _minimise(self, power: float, evaluations: int) -> None:
        logs = torch.cat(self._best.multipliers).log()
        value, gradient = self._gradient(self._best, power)
        pairs: list[tuple[Tensor, Tensor]] = []
        left = evaluations
        while left > 0:
            direction = _quasi_newton_direction(gradient, pairs)
            slope = float(gradient @ direction)
            if not slope < 0:
                if not pairs:
                    return
                pairs = []
                continue
            length = 1.0
            while left > 0:
                left -= 1
                trial = logs + length * direction
                swept = self._swept(trial)
                if swept is None:
                    length *= 0.3
                    continue
                new, ahead = self._gradient(swept, power)
                if new <= value + 1e-4 * length * slope:
                    break
                length *= 0.5
            else:
                return
            moved, turned = trial - logs, ahead - gradient
            if float(moved @ turned) > 1e-10 * float(moved.norm() * turned.norm()):
                pairs = [*pairs, (moved, turned)][-_PAIRS:]
            logs, value, gradient = trial, new, ahead

    def _gradient(self, swept: Swept, power: float) -> tuple[float, Tensor]:
        value, taken, given = self._value(swept, power)
        return value, torch.cat(swept.multipliers) * (given - taken)


def _quasi_newton_direction(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The two loops of L-BFGS, with no step longer than `_LARGEST_STEP`."""
    direction, factors = gradient.clone(), []
    for moved, turned in reversed(pairs):
        factors.append(float(moved @ direction) / float(turned @ moved))
        direction -= factors[-1] * turned
    if pairs:
        moved, turned = pairs[-1]
        direction *= float(moved @ turned) / float(turned @ turned)
    else:
        direction *= 0.3 / gradient.abs().max().clamp_min(2.0**-100)
    for (moved, turned), factor in zip(pairs, reversed(factors), strict=True):
        direction += moved * (factor - float(turned @ direction) / float(turned @ moved))
    longest = float(direction.abs().max())
    return -direction * min(1.0, _LARGEST_STEP / max(longest, 2.0**-100))
