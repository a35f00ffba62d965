"""Learning rates of an update, by the name of the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experiments.config import SweepConfig


def _constant(config: SweepConfig, after: int) -> float:
    return 1.0


def _cosine(config: SweepConfig, after: int) -> float:
    return (1 + math.cos(math.pi * after / max(config.steps - config.warmup_steps, 1))) / 2


def _step25(config: SweepConfig, after: int) -> float:
    quarters = 4 * after // (config.schedule_epochs * config.steps_per_epoch)
    return float(0.75 ** min(quarters, 3))


def _cont(config: SweepConfig, after: int) -> float:
    return float(0.95 ** (after // (config.schedule_epochs * config.steps_per_epoch)))


# Schedule to the factor of `lr` after so many updates that follow the warm-up.
SCHEDULES: dict[str, Callable[[SweepConfig, int], float]] = {
    "constant": _constant,
    "cosine": _cosine,
    "step25": _step25,
    "cont": _cont,
}
# Schedule to the default of `schedule_epochs`, for those that need it.
SCHEDULE_EPOCHS = {"step25": 10_000, "cont": 100}


def learning_rate(config: SweepConfig, step: int) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    Linear warm-up `lr (step + 1) / warmup_steps`, then `lr` times a factor: 1 ("constant");
    `(1 + cos(pi t)) / 2` with t from 0 to 1 over the steps that follow the warm-up ("cosine");
    0.75 to the power of the number of quarters of the next `schedule_epochs` epochs that have
    passed, at most 3 ("step25"); 0.95 for every `schedule_epochs` epochs that have passed ("cont").
    *Warmup20000Step25* of Khromov and Singh (2024) is "step25" with 20,000 warm-up steps,
    their *Cont100* is "cont".

    Args:
        config: names the schedule.
        step: 0 to steps - 1.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    return config.lr * SCHEDULES[config.schedule](config, step - config.warmup_steps)
