"""The local engine: groups of networks side by side on the threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from experiments.progress import progress_on_stderr
from experiments.task import Task, sweep_data, train_task

# Activations of a layer in a step below which a second thread costs more than it brings.
_SMALL_STEP = 1 << 19


def train_on_threads(tasks: Sequence[Task], every: Sequence[Task]) -> None:
    """Train groups side by side, with the threads of the process shared out among them.

    A step is a few short operations: two groups on one thread each are faster than one group on
    two threads, far more so where other programs use the processor, since no thread has to wait
    for the other at the end of every operation. Small groups have one thread in any case.
    """
    threads = torch.get_num_threads()
    # From all groups, not only those to train: the threads of a product may change its rounding.
    workers = min(threads, len(every))
    small = all(task.cost * task.config.batch_size < _SMALL_STEP for task in every)
    each = 1 if small else threads // workers
    stopped = threading.Event()
    data = {task.folder: sweep_data(task.config, task.folder) for task in tasks}
    total = sum(task.config.steps * task.cost for task in tasks)
    try:
        torch.set_num_threads(each)
        with (
            progress_on_stderr(max(total, 1)) as advance,
            ThreadPoolExecutor(workers) as pool,
        ):
            order = sorted(tasks, key=lambda task: task.config.steps * task.cost, reverse=True)
            futures = [
                pool.submit(train_task, task, data[task.folder], advance, stopped) for task in order
            ]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
