"""A task: the networks of one sweep that are trained together, with what it reads and writes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from experiments.checkpoints import checkpoint_name, write_checkpoint
from experiments.config import SweepConfig
from experiments.data import ClassificationData, load_data
from experiments.folder import SweepFolder, finished, run_name, write_json
from experiments.metrics import metrics_table, write_part
from experiments.progress import Advance
from experiments.train import Network, ResumeFile, Snapshot, train_group


def load_sweep_data(config: SweepConfig) -> ClassificationData:
    """Load the data that a configuration names; samples are flat for the model "fcn".

    Raises:
        ArgumentError: files are missing or damaged, or do not fit the configuration.
    """
    return load_data(
        config.data,
        folder=config.data_folder,
        train_size=config.train_size,
        classes=config.classes,
        image_size=config.image_size,
        flat=config.model == "fcn",
        label_noise=config.label_noise,
        label_noise_kind=config.label_noise_kind,
        seed=config.data_seed,
    )


def sweep_data(config: SweepConfig, folder: SweepFolder) -> ClassificationData:
    """Read the data of a sweep; make it first where that has not been done."""
    if not folder.data.exists():
        load_sweep_data(config).save(folder.data)
    return ClassificationData.load(folder.data)


def _metadata(config: SweepConfig, snapshot: Snapshot) -> dict[str, object]:
    left_out = {"name", "scale", "widths", "seeds", "checkpoints", "data_folder", "upper"}
    settings = {key: value for key, value in config.settings().items() if key not in left_out}
    return {
        "run": run_name(snapshot.network),
        "step": snapshot.step,
        "epoch": snapshot.step / config.steps_per_epoch,
        "seed": snapshot.network.seed,
        "width": snapshot.network.width,
        "sweep": config.name,
        "scale": config.scale,
        **settings,
        **config.architecture(),
        **dataclasses.asdict(snapshot.metrics),
    }


class _Writer:
    """Writes the snapshots of one group, except those of runs that are complete already."""

    def __init__(self, config: SweepConfig, folder: SweepFolder, networks: Iterable[Network]):
        self._config, self._folder = config, folder
        self._networks = frozenset(networks)
        for network in self._networks:
            run = folder.run(network)
            run.mkdir(exist_ok=True)
            for leftover in run.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def write(self, snapshot: Snapshot) -> None:
        if snapshot.network not in self._networks:
            return
        run, step = self._folder.run(snapshot.network), snapshot.step
        if snapshot.state_dict is not None:
            metadata = _metadata(self._config, snapshot)
            write_checkpoint(run / checkpoint_name(step), snapshot.state_dict, metadata)
        if snapshot.ended:
            steps = [s for s in self._config.checkpoints if s < step]
            done = {
                "status": "diverged" if snapshot.diverged else "ok",
                "step": step,
                "checkpoints": steps if snapshot.diverged else [*steps, step],
                "stopped": snapshot.ended,
            }
            write_json(run / "done.json", done)


class StoppedError(Exception):
    """Training was interrupted in another thread."""


@dataclass(frozen=True)
class Task:
    """Networks of one sweep that are trained together."""

    config: SweepConfig
    folder: SweepFolder
    index: int
    networks: tuple[Network, ...]

    @property
    def cost(self) -> int:
        """Cost of a step, relative to other tasks of the same model."""
        widest = max(network.width for network in self.networks)
        units = widest if self.config.model == "fcn" else widest * widest
        return len(self.networks) * units

    @property
    def label(self) -> str:
        """Words that are shown while the networks train."""
        narrowest, widest = self.networks[0].width, self.networks[-1].width
        widths = f"width {widest}" if narrowest == widest else f"widths {narrowest} to {widest}"
        what = f"{len(self.networks)} network{'s' * (len(self.networks) > 1)}, {widths}"
        return f"training {self.config.variant or self.config.name}: {what}"

    @property
    def metrics(self) -> Path:
        """File of the log of these networks."""
        return self.folder.metrics / f"group-{self.index:03d}.parquet"

    def missing(self) -> list[Network]:
        """Return the networks that are not complete; all, where the log is missing."""
        if not self.metrics.is_file():
            return list(self.networks)
        return [network for network in self.networks if finished(self.folder, network) is None]

    def resume_file(self) -> ResumeFile:
        """Return the saved state, deleted where checkpoints before it are missing."""
        resume = ResumeFile(self.folder.resume / f"group-{self.index:03d}.pt")
        saved = resume.load()
        if saved is not None and not self._has_checkpoints(saved[0]["step"], saved[0]["alive"]):
            resume.remove()
        return resume

    def _has_checkpoints(self, step: int, alive: list[bool]) -> bool:
        before = [s for s in self.config.checkpoints if s <= step]
        return all(
            (self.folder.run(network) / checkpoint_name(s)).is_file()
            for network, lives in zip(self.networks, alive, strict=True)
            if lives
            for s in before
        ) and all(
            finished(self.folder, network) is not None
            for network, lives in zip(self.networks, alive, strict=True)
            if not lives
        )


def train_task(
    task: Task, data: ClassificationData, advance: Advance, stopped: threading.Event
) -> None:
    """Train the networks of a task, from the last state that was saved, and write what they leave.

    Args:
        task: what to train.
        data: training and test set.
        advance: is told of progress, in steps times `Task.cost`.
        stopped: set from another thread to end the training where it is.

    Raises:
        StoppedError: `stopped` was set; the state is saved.
    """
    # The whole group, also where only one run is missing: the same arithmetic, the same bits.
    resume = task.resume_file()
    done = 0

    def on_step(step: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise StoppedError
        if step % 10 == 0 or step == task.config.steps:
            advance((step - done) * task.cost, task.label)
            done = step

    writer = _Writer(task.config, task.folder, task.missing())
    rows = train_group(task.config, task.networks, data, writer.write, on_step, resume)
    write_part(task.metrics, metrics_table(rows, task.config, run_name))
    resume.remove()
    advance((task.config.steps - done) * task.cost, task.label)
