"""Learning rates of an update, by the name of the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable


def _constant(after: int, length: int, period: int) -> float:
    return 1.0


def _cosine(after: int, length: int, period: int) -> float:
    return (1 + math.cos(math.pi * after / max(length, 1))) / 2


def _step25(after: int, length: int, period: int) -> float:
    return float(0.75 ** min(4 * after // period, 3))


def _cont(after: int, length: int, period: int) -> float:
    return float(0.95 ** (after // period))


# Schedule to the factor of `lr` after so many updates that follow the warm-up, of so many in all,
# with so many in `schedule_epochs` epochs.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step25": _step25,
    "cont": _cont,
}
# Schedule to the default of `schedule_epochs`, for those that need it.
SCHEDULE_EPOCHS = {"step25": 10_000, "cont": 100}


def learning_rate(
    step: int, *, lr: float, steps: int, warmup_steps: int, schedule: str, period: int
) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    Linear warm-up `lr (step + 1) / warmup_steps`, then `lr` times a factor: 1 ("constant");
    `(1 + cos(pi t)) / 2` with t from 0 to 1 over the steps that follow the warm-up ("cosine");
    0.75 to the power of the number of quarters of the next `period` updates that have passed, at
    most 3 ("step25"); 0.95 for every `period` updates that have passed ("cont").
    *Warmup20000Step25* of Khromov and Singh (2024) is "step25" with 20,000 warm-up steps,
    their *Cont100* is "cont".

    Args:
        step: 0 to steps - 1.
        lr: the peak.
        steps: number of updates.
        warmup_steps: how many of them warm up.
        schedule: a name in `SCHEDULES`.
        period: updates in `schedule_epochs` epochs; "constant" and "cosine" have none.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    return lr * SCHEDULES[schedule](step - warmup_steps, steps - warmup_steps, period)
