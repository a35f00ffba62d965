"""Training the demo's sweep: many small networks together, against one after another.

A unit is one update of one network. Few steps of every network are timed, a number that both sides
share; neither writes checkpoints.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import torch
from torch.nn import functional

from bench.turns import Benchmark, in_turn, measure
from experiments.config import SweepConfig
from experiments.data import ClassificationData
from experiments.models import fcn
from experiments.study import load_config
from experiments.task import load_sweep_data
from experiments.train import Network, group_networks, train_group

TOGETHER_STEPS = 200
ALONE_STEPS = 40


def sweep(steps: int) -> SweepConfig:
    return replace(load_config("double-descent", "demo"), steps=steps, checkpoints=(0,))


@cache
def data() -> ClassificationData:
    return load_sweep_data(sweep(1))


def together() -> None:
    """All networks as `train_sweeps` trains them: groups side by side, one thread each."""
    config, threads = sweep(TOGETHER_STEPS), torch.get_num_threads()
    groups = group_networks(config)
    workers = min(threads, len(groups))
    torch.set_num_threads(threads // workers)
    try:
        with ThreadPoolExecutor(workers) as pool:
            order = sorted(groups, key=lambda group: len(group) * group[-1].width, reverse=True)
            list(pool.map(lambda group: train_group(config, group, data(), lambda _: None), order))
    finally:
        torch.set_num_threads(threads)


def alone(config: SweepConfig, network: Network) -> None:
    """One network as one writes it in plain PyTorch."""
    torch.manual_seed(network.seed)
    model = fcn(network.width)
    optimizer = torch.optim.Adam(model.parameters(), config.lr)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(data().x_train), data().y_train)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def one_after_another() -> None:
    config = sweep(ALONE_STEPS)
    for width in config.widths:
        for seed in config.seeds:
            alone(config, Network(width, seed))


@in_turn("lipfast", "naive")
def bench_training_the_demo(benchmark: Benchmark, turn: int, implementation: str) -> None:
    config = sweep(1)
    networks = len(config.widths) * len(config.seeds)
    data()
    works = {
        "lipfast": (together, networks * TOGETHER_STEPS),
        "naive": (one_after_another, networks * ALONE_STEPS),
    }
    case = f"training the demo's {networks} networks, per update of one"
    measure(benchmark, case, implementation, works[implementation])
