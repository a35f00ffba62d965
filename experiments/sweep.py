"""A sweep on disk: trains what is missing, resumes after a kill, refuses to mix configurations.

<out>/<name>-<scale>/
    sweep.json              the configuration that everything below belongs to
    data.safetensors        x_train, y_train, x_test, y_test
    checkpoints/<run>/step_000100.safetensors
    checkpoints/<run>/done.json    written when the run is complete
    scores/                 written by `lipfast score`
    *.png, *.pdf            figures
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoints import checkpoint_name, write_checkpoint
from experiments.config import ConfigError, SweepConfig
from experiments.data import CLASSES, INPUTS, ClassificationData, training_data
from experiments.files import write_whole
from experiments.progress import Advance, progress_on_stderr
from experiments.train import Network, Snapshot, group_networks, train_group
from lipfast.errors import LipfastError

# Raised whenever the same configuration would train other networks than before.
_FORMAT = 1


@dataclass(frozen=True)
class SweepFolder:
    """Where the parts of one sweep are.

    Attributes:
        root: the folder of the sweep.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """The configuration, as JSON."""
        return self.root / "sweep.json"

    @property
    def data(self) -> Path:
        """The training and test set."""
        return self.root / "data.safetensors"

    @property
    def checkpoints(self) -> Path:
        """The archive of checkpoints, one folder per run."""
        return self.root / "checkpoints"

    @property
    def scores(self) -> Path:
        """The store that `lipfast score` writes."""
        return self.root / "scores"

    def run(self, network: Network) -> Path:
        """Return the folder of one run."""
        return self.checkpoints / run_name(network)


@dataclass(frozen=True)
class TrainingSummary:
    """What `train_sweep` did.

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


def run_name(network: Network) -> str:
    """Return the name of a run: of its folder and in the metadata of its checkpoints.

    Example:
        >>> run_name(Network(width=16, seed=0))
        'width-00016-seed-0'
    """
    return f"width-{network.width:05d}-seed-{network.seed}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    parts = [
        f"{key} (there {stored.get(key)!r}, now {wanted.get(key)!r})"
        for key in sorted(stored.keys() | wanted.keys())
        if stored.get(key) != wanted.get(key)
    ]
    return ", ".join(parts)


def _clear(folder: SweepFolder) -> None:
    for path in (folder.checkpoints, folder.scores):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.data, *folder.root.glob("*.png"), *folder.root.glob("*.pdf")):
        path.unlink(missing_ok=True)
    folder.settings.unlink()  # last: a sweep half cleared is still known as one


def open_sweep(config: SweepConfig, out: Path, *, force: bool = False) -> SweepFolder:
    """Make or find the folder of a sweep.

    Args:
        config: the sweep.
        out: the folder of all sweeps; this one's is `<out>/<name>-<scale>`.
        force: delete what an earlier run of the sweep left there.

    Returns:
        The folder, which holds this configuration.

    Raises:
        ConfigError: the folder holds a sweep with another configuration, or something else, or
            cannot be written.
    """
    folder = SweepFolder(out / f"{config.name}-{config.scale}")
    wanted = {"format": _FORMAT, **config.settings()}
    try:
        stored = _read_json(folder.settings)
        if force and stored is not None:
            _clear(folder)
            stored = None
        if stored is None:
            if folder.root.exists() and any(folder.root.iterdir()):
                raise ConfigError(
                    f"{folder.root} is not empty and holds no readable sweep.json, so it is not "
                    "a sweep: empty it yourself or choose another folder with --out"
                )
            folder.root.mkdir(parents=True, exist_ok=True)
            _write_json(folder.settings, wanted)
        elif stored != wanted:
            raise ConfigError(
                f"{folder.root} holds this sweep with other settings: "
                f"{_differences(stored, wanted)}. Train into another folder with --out, delete "
                "the old checkpoints and scores with --force, or undo the change"
            )
        folder.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder.root}: cannot write the sweep: {error.strerror or error}. Choose another "
            "folder with --out"
        ) from None
    return folder


def _data(config: SweepConfig, folder: SweepFolder) -> ClassificationData:
    if not folder.data.exists():
        training_data(config.train_size, config.label_noise, config.data_seed).save(folder.data)
    return ClassificationData.load(folder.data)


def finished(folder: SweepFolder, network: Network) -> dict[str, Any] | None:
    """Return what `done.json` says of a run whose checkpoints are all there, else None."""
    run = folder.run(network)
    done = _read_json(run / "done.json")
    if done is None:
        return None
    complete = all((run / checkpoint_name(step)).is_file() for step in done["checkpoints"])
    return done if complete else None


def _metadata(config: SweepConfig, snapshot: Snapshot) -> dict[str, object]:
    settings = {
        key: value
        for key, value in config.settings().items()
        if key not in {"name", "scale", "widths", "seeds", "checkpoints"}
    }
    return {
        "run": run_name(snapshot.network),
        "step": snapshot.step,
        "epoch": snapshot.step / config.steps_per_epoch,
        "seed": snapshot.network.seed,
        "width": snapshot.network.width,
        "inputs": INPUTS,
        "classes": CLASSES,
        "sweep": config.name,
        "scale": config.scale,
        "data": "mnist1d",
        **settings,
        **dataclasses.asdict(snapshot.metrics),
    }


class _Writer:
    """Writes the snapshots of one group, except those of runs that are complete already."""

    def __init__(self, config: SweepConfig, folder: SweepFolder, networks: Iterable[Network]):
        self._config, self._folder = config, folder
        self._steps: dict[Network, list[int]] = {network: [] for network in networks}
        for network in self._steps:
            run = folder.run(network)
            run.mkdir(exist_ok=True)
            for leftover in run.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)

    def write(self, snapshot: Snapshot) -> None:
        if snapshot.network not in self._steps:
            return
        run, steps = self._folder.run(snapshot.network), self._steps[snapshot.network]
        if snapshot.state_dict is not None:
            metadata = _metadata(self._config, snapshot)
            write_checkpoint(run / checkpoint_name(snapshot.step), snapshot.state_dict, metadata)
            steps.append(snapshot.step)
        if snapshot.diverged or snapshot.step == self._config.checkpoints[-1]:
            status = "diverged" if snapshot.diverged else "ok"
            done = {"status": status, "step": snapshot.step, "checkpoints": steps}
            _write_json(run / "done.json", done)


class _StoppedError(Exception):
    """Training was interrupted in another thread."""


def _train_group(
    config: SweepConfig,
    folder: SweepFolder,
    data: ClassificationData,
    group: tuple[Network, ...],
    *,
    advance: Advance,
    stopped: threading.Event,
) -> None:
    # The whole group, also where only one run is missing: the same arithmetic, the same bits.
    missing = [network for network in group if finished(folder, network) is None]
    cost = _cost(group)
    narrowest, widest = group[0].width, group[-1].width
    widths = f"width {widest}" if narrowest == widest else f"widths {narrowest} to {widest}"

    def on_step(step: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        if step % 10 == 0:
            advance(10 * cost, f"training {len(group)} networks, {widths}")

    train_group(config, group, data, _Writer(config, folder, missing).write, on_step)


def _train_groups(
    config: SweepConfig,
    folder: SweepFolder,
    data: ClassificationData,
    missing: set[Network],
) -> None:
    """Train groups side by side, with the threads of the process shared out among them.

    A step is a few short operations: two groups on one thread each are faster than one group on
    two threads, far more so where other programs use the processor, since no thread has to wait
    for the other at the end of every operation.
    """
    every = group_networks(config)
    groups = [group for group in every if missing.intersection(group)]
    threads = torch.get_num_threads()
    # From all groups, not only those to train: the threads of a product may change its rounding.
    workers = min(threads, len(every))
    stopped = threading.Event()
    try:
        torch.set_num_threads(threads // workers)
        with (
            progress_on_stderr(config.steps * sum(map(_cost, groups))) as advance,
            ThreadPoolExecutor(workers) as pool,
        ):
            futures = [
                pool.submit(
                    _train_group, config, folder, data, group, advance=advance, stopped=stopped
                )
                for group in sorted(groups, key=_cost, reverse=True)
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


def _cost(group: tuple[Network, ...]) -> int:
    return len(group) * max(network.width for network in group)


def train_sweep(config: SweepConfig, folder: SweepFolder) -> TrainingSummary:
    """Train the runs of a sweep that are not complete and write their checkpoints.

    A run is complete when its `done.json` and all checkpoints named there exist. Killed at any
    moment, the next call writes the checkpoints that are missing, bit for bit as an undisturbed
    run on the same machine with the same number of threads would have.

    Args:
        config: the sweep.
        folder: from `open_sweep`.

    Returns:
        What was trained.

    Raises:
        LipfastError: a file cannot be written or the data file is damaged.
    """
    started = time.perf_counter()
    networks = [Network(width, seed) for width in config.widths for seed in config.seeds]
    missing = {network for network in networks if finished(folder, network) is None}
    try:
        data = _data(config, folder)
        if missing:
            _train_groups(config, folder, data, missing)
    except OSError as error:
        raise LipfastError(f"{folder.root}: cannot write checkpoints: {error}") from None
    records = {network: finished(folder, network) for network in networks}
    return TrainingSummary(
        trained=len(missing),
        skipped=len(networks) - len(missing),
        diverged=tuple(
            run_name(network)
            for network, done in records.items()
            if done is not None and done["status"] == "diverged"
        ),
        checkpoints=sum(len(done["checkpoints"]) for done in records.values() if done is not None),
        seconds=time.perf_counter() - started,
    )
