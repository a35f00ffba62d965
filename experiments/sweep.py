"""Trains the sweeps of a study: what is missing, with either engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.config import SweepConfig
from experiments.engine.local import train_on_threads
from experiments.engine.ray import train_on_ray
from experiments.folder import (
    SweepFolder,
    finished,
    found_folder,
    open_sweep,
    read_metrics,
    run_name,
    sweep_folder,
)
from experiments.task import Task
from experiments.train import Network, group_networks
from lipfast.errors import ArgumentError, LipfastError

__all__ = [
    "ENGINES",
    "SweepFolder",
    "TrainingSummary",
    "finished",
    "found_folder",
    "open_sweep",
    "read_metrics",
    "run_name",
    "sweep_folder",
    "train_sweep",
    "train_sweeps",
]

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class TrainingSummary:
    """What `train_sweeps` did.

    Attributes:
        trained: runs trained now.
        skipped: runs that were complete already.
        diverged: names of the runs, old and new, whose weights or loss became NaN or infinite.
        checkpoints: files of the whole sweep.
        seconds: wall time of the training.
    """

    trained: int
    skipped: int
    diverged: tuple[str, ...]
    checkpoints: int
    seconds: float


def _networks(config: SweepConfig) -> list[Network]:
    return [Network(width, seed) for width in config.widths for seed in config.seeds]


def _train_with(unfinished: Sequence[Task], every: Sequence[Task], engine: str) -> None:
    if engine == "ray":
        train_on_ray(unfinished)
    else:
        train_on_threads(unfinished, every)


def train_sweeps(
    sweeps: Sequence[tuple[SweepConfig, SweepFolder]], engine: str = "local"
) -> TrainingSummary:
    """Train the runs of sweeps that are not complete and write their checkpoints and logs.

    A run is complete when its `done.json` and all checkpoints named there exist, and the log of its
    group. Killed at any moment, the next call goes on from the last state that was saved, and what
    it writes is bit for bit what an undisturbed run on the same machine with the same number of
    threads would have written.

    Args:
        sweeps: configurations and their folders, from `open_sweep`.
        engine: "local": threads of this process; "ray": workers of a Ray cluster, whose machines
            all see the folders.

    Returns:
        What was trained.

    Raises:
        ArgumentError: the engine is unknown, or Ray is not installed or cannot be reached.
        LipfastError: a file cannot be written or the data file is damaged.
    """
    if engine not in ENGINES:
        raise ArgumentError(f"engine '{engine}': expected {' or '.join(ENGINES)}")
    started = time.perf_counter()
    tasks = [
        Task(config, folder, index, group)
        for config, folder in sweeps
        for index, group in enumerate(group_networks(config))
    ]
    unfinished = [task for task in tasks if task.missing()]
    trained = sum(len(task.missing()) for task in unfinished)
    try:
        if unfinished:
            _train_with(unfinished, tasks, engine)
    except OSError as error:
        raise LipfastError(f"{sweeps[0][1].root}: cannot write checkpoints: {error}") from None
    records = {
        "/".join(filter(None, (config.variant, run_name(network)))): finished(folder, network)
        for config, folder in sweeps
        for network in _networks(config)
    }
    return TrainingSummary(
        trained=trained,
        skipped=len(records) - trained,
        diverged=tuple(
            name
            for name, done in records.items()
            if done is not None and done["status"] == "diverged"
        ),
        checkpoints=sum(len(done["checkpoints"]) for done in records.values() if done is not None),
        seconds=time.perf_counter() - started,
    )


def train_sweep(config: SweepConfig, folder: SweepFolder) -> TrainingSummary:
    """Train the runs of one sweep that are not complete, as `train_sweeps` does."""
    return train_sweeps([(config, folder)])
