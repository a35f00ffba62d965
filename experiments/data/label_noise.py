"""Label noise: labels redrawn, shuffled among themselves, or swapped in pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from lipfast.errors import ArgumentError

KINDS = ("redraw", "shuffle", "swap")


def with_label_noise(
    labels: Tensor, fraction: float, seed: int, classes: int = 10, kind: str = "redraw"
) -> Tensor:
    """Disturb about a fraction of the labels.

    The same seed disturbs nested sets: `"redraw"` and `"swap"` do to the samples of a smaller
    fraction what they do to them at a larger one. How often a class occurs is changed by
    `"redraw"` only.

    Args:
        labels: int64 (samples,).
        fraction: between 0 and 1.
        seed: of the choice of samples and of the new labels.
        classes: labels are from 0 to classes - 1.
        kind: what happens to `round(fraction * samples)` of them. `"redraw"`: drawn anew,
            uniformly, so that one in `classes` keeps its value. `"shuffle"`: permuted among
            themselves. `"swap"`: exchanged in disjoint pairs (at an odd number, one stays);
            the pairs of a smaller fraction are pairs of a larger one.

    Returns:
        A new int64 tensor (samples,).

    Raises:
        ArgumentError: the fraction is outside [0, 1], or the kind is unknown.

    Example:
        >>> labels = torch.zeros(1000, dtype=torch.int64)
        >>> noisy = with_label_noise(labels, 0.2, seed=0)
        >>> 150 < int((noisy != labels).sum()) <= 200
        True
    """
    if not 0 <= fraction <= 1:
        raise ArgumentError(f"label_noise is {fraction}; it must be between 0 and 1")
    if kind not in KINDS:
        raise ArgumentError(f"label_noise_kind is {kind!r}; allowed are {', '.join(KINDS)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    count = round(fraction * len(labels))
    chosen = order[:count]
    noisy = labels.clone()
    if kind == "redraw":
        drawn = torch.randint(classes, (len(labels),), generator=generator)
        noisy[chosen] = drawn[chosen]
    elif kind == "shuffle":
        noisy[chosen] = labels[chosen[torch.randperm(count, generator=generator)]]
    else:
        pairs = order[: count - count % 2].reshape(-1, 2)
        noisy[pairs] = labels[pairs.flip(1)]
    return noisy
