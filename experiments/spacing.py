"""Log-spaced steps, at which checkpoints are written and metrics logged."""

from __future__ import annotations


def log_spaced_steps(steps: int, count: int) -> tuple[int, ...]:
    """Return `count` steps from 0 to `steps`: 0, 1, then in constant ratio where integers allow.

    Args:
        steps: the last one; 0 gives (0,).
        count: how many, at least 2; at most steps + 1 are returned.

    Returns:
        Ascending distinct steps, the first 0 and the last `steps`.

    Example:
        >>> log_spaced_steps(1000, 8)
        (0, 1, 3, 10, 32, 101, 318, 1000)
    """
    if count == 2 or steps == 0:
        return (0, steps)[: steps + 1]
    chosen = [0, 1]
    for remaining in range(count - 2, 0, -1):
        current = chosen[-1]
        if current >= steps:
            break
        ratio = (steps / current) ** (1 / remaining)
        chosen.append(max(current + 1, round(current * ratio)))
    return tuple(chosen)
