"""A sweep on disk: trains what is missing, resumes after a kill, refuses to mix configurations.

<out>/<name>-<scale>/       with a folder <variant>/ inside where the scale has variants
    sweep.json              the configuration that everything below belongs to
    data.safetensors        x_train, y_train, x_test, y_test, y_train_true
    checkpoints/<run>/step_000100.safetensors
    checkpoints/<run>/done.json    written when the run is complete
    metrics/<group>.parquet        one row per run and logged step
    resume/<group>.pt       the state of a group that is being trained
    scores/                 written by `lipfast score`
    *.png, *.pdf            figures
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from experiments.checkpoints import checkpoint_name, write_checkpoint
from experiments.config import ConfigError, SweepConfig
from experiments.data import ClassificationData, load_data
from experiments.files import write_whole
from experiments.metrics import metrics_table, read_parts, write_part
from experiments.progress import Advance, progress_on_stderr
from experiments.train import Network, ResumeFile, Snapshot, group_networks, train_group
from lipfast.errors import LipfastError

# Raised whenever the same configuration would train other networks than before.
_FORMAT = 3
# Activations of a layer in a step below which a second thread costs more than it brings.
_SMALL_STEP = 1 << 19


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

    @property
    def metrics(self) -> Path:
        """The logs, a Parquet file per group."""
        return self.root / "metrics"

    @property
    def resume(self) -> Path:
        """The states of groups that are being trained."""
        return self.root / "resume"

    def run(self, network: Network) -> Path:
        """Return the folder of one run."""
        return self.checkpoints / run_name(network)


def sweep_folder(config: SweepConfig, out: Path) -> SweepFolder:
    """Return where a sweep is, or would be, inside the folder of all sweeps."""
    return SweepFolder(out / f"{config.name}-{config.scale}" / config.variant)


def read_metrics(folder: SweepFolder) -> pa.Table:
    """Read the logs of a sweep: one row per run and logged step, see `experiments.metrics`."""
    return read_parts(folder.metrics)


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
    for path in (folder.checkpoints, folder.scores, folder.metrics, folder.resume):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.data, *folder.root.glob("*.png"), *folder.root.glob("*.pdf")):
        path.unlink(missing_ok=True)
    folder.settings.unlink()  # last: a sweep half cleared is still known as one


def open_sweep(config: SweepConfig, out: Path, *, force: bool = False) -> SweepFolder:
    """Make or find the folder of a sweep.

    Args:
        config: the sweep.
        out: the folder of all sweeps; this one's is `<out>/<name>-<scale>[/<variant>]`.
        force: delete what an earlier run of the sweep left there.

    Returns:
        The folder, which holds this configuration.

    Raises:
        ConfigError: the folder holds a sweep with another configuration, or something else, or
            cannot be written.
    """
    folder = sweep_folder(config, out)
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
        for path in (folder.checkpoints, folder.metrics, folder.resume):
            path.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder.root}: cannot write the sweep: {error.strerror or error}. Choose another "
            "folder with --out"
        ) from None
    return folder


def _data(config: SweepConfig, folder: SweepFolder) -> ClassificationData:
    if not folder.data.exists():
        load_data(config).save(folder.data)
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
    left_out = {"name", "scale", "widths", "seeds", "checkpoints", "data_folder"}
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
            _write_json(run / "done.json", done)


class _StoppedError(Exception):
    """Training was interrupted in another thread."""


@dataclass(frozen=True)
class _Task:
    """Networks of one sweep that are trained together."""

    config: SweepConfig
    folder: SweepFolder
    index: int
    networks: tuple[Network, ...]

    @property
    def cost(self) -> int:
        """Of a step, relative to other tasks of the same model."""
        widest = max(network.width for network in self.networks)
        units = widest if self.config.model == "fcn" else widest * widest
        return len(self.networks) * units

    @property
    def label(self) -> str:
        """What is shown while it runs."""
        narrowest, widest = self.networks[0].width, self.networks[-1].width
        widths = f"width {widest}" if narrowest == widest else f"widths {narrowest} to {widest}"
        what = f"{len(self.networks)} network{'s' * (len(self.networks) > 1)}, {widths}"
        return f"training {self.config.variant or self.config.name}: {what}"

    @property
    def metrics(self) -> Path:
        """Its part of the log."""
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


def _train_task(
    task: _Task, data: ClassificationData, advance: Advance, stopped: threading.Event
) -> None:
    # The whole group, also where only one run is missing: the same arithmetic, the same bits.
    resume = task.resume_file()
    done = 0

    def on_step(step: int) -> None:
        nonlocal done
        if stopped.is_set():
            raise _StoppedError
        if step % 10 == 0 or step == task.config.steps:
            advance((step - done) * task.cost, task.label)
            done = step

    writer = _Writer(task.config, task.folder, task.missing())
    rows = train_group(task.config, task.networks, data, writer.write, on_step, resume)
    write_part(task.metrics, metrics_table(rows, task.config, run_name))
    resume.remove()
    advance((task.config.steps - done) * task.cost, task.label)


def _train_tasks(tasks: Sequence[_Task], every: Sequence[_Task]) -> None:
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
    data = {task.folder: _data(task.config, task.folder) for task in tasks}
    total = sum(task.config.steps * task.cost for task in tasks)
    try:
        torch.set_num_threads(each)
        with (
            progress_on_stderr(max(total, 1)) as advance,
            ThreadPoolExecutor(workers) as pool,
        ):
            order = sorted(tasks, key=lambda task: task.config.steps * task.cost, reverse=True)
            futures = [
                pool.submit(_train_task, task, data[task.folder], advance, stopped)
                for task in order
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


def _networks(config: SweepConfig) -> list[Network]:
    return [Network(width, seed) for width in config.widths for seed in config.seeds]


def train_sweeps(sweeps: Sequence[tuple[SweepConfig, SweepFolder]]) -> TrainingSummary:
    """Train the runs of sweeps that are not complete and write their checkpoints and logs.

    A run is complete when its `done.json` and all checkpoints named there exist, and the log of its
    group. Killed at any moment, the next call goes on from the last state that was saved, and what
    it writes is bit for bit what an undisturbed run on the same machine with the same number of
    threads would have written.

    Args:
        sweeps: configurations and their folders, from `open_sweep`.

    Returns:
        What was trained.

    Raises:
        LipfastError: a file cannot be written or the data file is damaged.
    """
    started = time.perf_counter()
    tasks = [
        _Task(config, folder, index, group)
        for config, folder in sweeps
        for index, group in enumerate(group_networks(config))
    ]
    unfinished = [task for task in tasks if task.missing()]
    trained = sum(len(task.missing()) for task in unfinished)
    try:
        if unfinished:
            _train_tasks(unfinished, tasks)
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
