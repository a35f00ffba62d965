"""An archive of real runs: 40-256-256-10 perceptrons, trained on MNIST1D."""

from __future__ import annotations

from pathlib import Path

from experiments.checkpoints import checkpoint_name, write_checkpoint
from experiments.config import SweepConfig
from experiments.data import training_data
from experiments.train import Network, Snapshot, train_group

WIDTH, DEPTH = 256, 2
STEPS_BETWEEN = 2
ARCHITECTURE = "experiments.models:fcn"


def train_archive(folder: Path, checkpoints: int, runs: int) -> Path:
    """Trains `runs` networks together and writes their checkpoints, `folder/run-*/step_*`.

    Args:
        folder: made where it is missing.
        checkpoints: of all runs together; a multiple of `runs`.
        runs: networks, one seed each.

    Returns:
        The folder.
    """
    each = checkpoints // runs
    config = SweepConfig(
        name="bench",
        scale="bench",
        widths=(WIDTH,),
        seeds=tuple(range(runs)),
        steps=STEPS_BETWEEN * (each - 1),
        lr=1e-3,
        checkpoints=tuple(range(0, STEPS_BETWEEN * each, STEPS_BETWEEN)),
        depth=DEPTH,
        optimizer="adam",
        train_size=400,
    )
    networks = [Network(WIDTH, seed) for seed in config.seeds]
    for network in networks:
        (folder / f"run-{network.seed:03d}").mkdir(parents=True, exist_ok=True)

    def write(snapshot: Snapshot) -> None:
        if snapshot.state_dict is None:
            raise RuntimeError(f"run {snapshot.network.seed} diverged")
        run = f"run-{snapshot.network.seed:03d}"
        path = folder / run / checkpoint_name(snapshot.step)
        metadata = {"run": run, "step": snapshot.step, "width": WIDTH, "depth": DEPTH}
        write_checkpoint(path, snapshot.state_dict, metadata)

    train_group(config, networks, training_data(config.train_size, 0.0, 0), write)
    return folder
