"""The Ray engine: groups of networks are tasks of a Ray cluster."""

from __future__ import annotations

import dataclasses
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.progress import progress_on_stderr
from experiments.task import Task, sweep_data, train_task
from lipfast.errors import ArchiveError, LipfastError
from lipfast.scoring.engine.cluster import call_from, connect, import_ray, unseen

_RETRIES = 3  # of a task whose worker, or whose machine, is lost
_PACKAGE_FOLDER = Path(__file__).resolve().parents[2]


def train_on_ray(tasks: Sequence[Task]) -> None:
    """Train groups on the workers of a Ray cluster, on one thread each.

    All machines see the folder of the sweeps: workers write checkpoints there, and the state of a
    group now and then. A group whose worker is lost is done again from its last state, by another.

    Args:
        tasks: what to train.

    Raises:
        ArgumentError: Ray is not installed, or cannot be reached.
        ArchiveError: a machine does not see the folder.
        LipfastError: a group failed, or its workers were lost one after another.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        connect(ray)
    try:
        placed = [_absolute(task) for task in tasks]
        for folder, config in {task.folder: task.config for task in placed}.items():
            sweep_data(config, folder)  # made here, so that workers need only read it
        _require_visible(ray, placed)
        _train_remotely(ray, sorted(placed, key=lambda t: t.config.steps * t.cost, reverse=True))
    finally:
        if started:
            ray.shutdown()


def _absolute(task: Task) -> Task:
    folder = dataclasses.replace(task.folder, root=task.folder.root.resolve())
    return dataclasses.replace(task, folder=folder)


def _require_visible(ray: Any, tasks: Sequence[Task]) -> None:
    folders = list(dict.fromkeys(task.folder for task in tasks))
    for machine, index in unseen(ray, [str(folder.data) for folder in folders]):
        raise ArchiveError(
            f"the machine {machine} of the Ray cluster cannot see '{folders[index].data}', or sees "
            "another file there. Choose with --out a folder that all machines mount"
        )


def _train_remotely(ray: Any, tasks: Sequence[Task]) -> None:
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(call_from)
    running = {
        remote.remote(str(_PACKAGE_FOLDER), pickle.dumps((_train_here, (task,)))): task
        for task in tasks
    }
    total = sum(task.config.steps * task.cost for task in tasks)
    try:
        with progress_on_stderr(max(total, 1)) as advance:
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                task = running.pop(done)
                _raise_failure(ray, done, task)
                advance(task.config.steps * task.cost, task.label)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


def _raise_failure(ray: Any, done: Any, task: Task) -> None:
    """Raise what went wrong with a task, if anything did."""
    try:
        error = ray.get(done)
    except ray.exceptions.RayError as lost:
        reason = (str(lost).strip().splitlines() or [type(lost).__name__])[-1]
        raise LipfastError(
            f"{task.folder.root}: {task.label} failed on the Ray cluster: {reason}. What is "
            "complete is kept; the same command goes on from there"
        ) from None
    if error is not None:
        raise error


def _train_here(task: Task) -> LipfastError | None:
    """On a worker: train a group; an error that a user can mend is an answer too."""
    torch.set_num_threads(1)
    try:
        data = sweep_data(task.config, task.folder)
        train_task(task, data, lambda amount, description: None, threading.Event())
    except OSError as error:
        return LipfastError(f"{task.folder.root}: cannot write checkpoints: {error}")
    except LipfastError as error:
        return type(error)(*error.args)
    return None
