"""Difference quotients of enclosed values, rounded down.

Part of the proof of every certified lower bound. Given are stored points, computed outputs and
bounds of their errors; ``||f(a) - f(b)|| / ||a - b||`` is at least what is returned. Norms of
vectors are rounded to the safe side by `narrowed` and by ``1 + gamma_{n+8}``, more than the n + 2
roundings in them and the two of that factor and product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.norms import Norm
from lipfast.rounding import gamma, narrowed, widened


def differences(
    points: Tensor, outputs: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> tuple[Tensor, Tensor]:
    """Changes of the outputs elementwise, rounded down, and distances of the points, rounded up."""
    first, second = pairs
    flat = points.reshape(*points.shape[:2], -1)
    change = narrowed((outputs[:, first] - outputs[:, second]).abs(), 2)
    apart = widened((flat[:, first] - flat[:, second]).abs(), 2)
    return change, _norms_of_vectors(apart, norm) * (1 + gamma(apart.shape[-1] + 8))


def quotients(
    change: Tensor, distance: Tensor, errors: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> Tensor:
    """Certified difference quotients (networks, pairs), rounded down; 0 where nothing is proved.

    With ``d = max(|f(a) - f(b)| - e_a - e_b, 0)`` elementwise, the value is
    ``||d|| / ||a - b||`` with the numerator rounded down and the denominator rounded up.
    `change` and `distance` are those of `differences`.
    """
    first, second = pairs
    room = widened(errors[:, first] + errors[:, second], 2)
    proved = narrowed((change - room).clamp_min(0.0), 2)
    return _sound(narrowed(_norms_of_vectors(proved, norm), proved.shape[-1] + 8), distance)


def quotients_in_norm(
    change: Tensor, distance: Tensor, errors: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> Tensor:
    """Certified difference quotients where `errors` (networks, C) bound errors in norm 2.

    ``||f(a) - f(b)|| >= ||f^(a) - f^(b)|| - E_a - E_b`` with ``||e||_inf <= ||e||_2`` and, of k
    outputs, ``||e||_1 <= sqrt(k) ||e||_2``.
    """
    lengths = lengths_of_changes(change, norm)
    return quotients_of_lengths(lengths, distance, errors, pairs, change.shape[-1], norm=norm)


def lengths_of_changes(change: Tensor, norm: Norm) -> Tensor:
    """Norms (networks, pairs) of `differences`' changes of the outputs, rounded down."""
    return narrowed(_norms_of_vectors(change, norm), change.shape[-1] + 8)


def quotients_of_lengths(
    lengths: Tensor,
    distance: Tensor,
    errors: Tensor,
    pairs: tuple[Tensor, Tensor],
    outputs: int,
    *,
    norm: Norm,
) -> Tensor:
    """`quotients_in_norm` from `lengths_of_changes` of so many outputs."""
    first, second = pairs
    factor = math.sqrt(outputs) if norm == 1 else 1.0
    room = (errors[:, first] + errors[:, second]) * widened(factor, 8)
    return _sound(narrowed((lengths - room).clamp_min(0.0), 2), distance)


def _sound(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient rounded down, or 0."""
    value = narrowed(numerator / denominator, 4)
    # Also false where the points coincide, the forward pass overflowed, or numbers are so small
    # that squares underflow or the quotient is denormal: its rounding is not relative then.
    sound = torch.isfinite(value) & (denominator > 1e-140) & (numerator > 1e-140)
    sound &= value > 1e-300
    return torch.where(sound, value, torch.zeros_like(value))


def _norms_of_vectors(vectors: Tensor, norm: Norm) -> Tensor:
    """Norm of non-negative vectors along the last dimension, at most n + 2 roundings each."""
    if norm == 1:
        return vectors.sum(-1)
    if math.isinf(norm):
        return vectors.amax(-1)
    return (vectors * vectors).sum(-1).sqrt()
