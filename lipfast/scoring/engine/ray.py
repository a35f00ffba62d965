"""The Ray engine: workers of a cluster score pieces of an archive."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter, deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lipfast._native import cuda_info
from lipfast._version import __version__
from lipfast.checkpoints import CheckpointFile
from lipfast.errors import ArchiveError, ArgumentError, LipfastError
from lipfast.scoring.device import AUTO
from lipfast.scoring.engine.cluster import connect, import_ray, unseen
from lipfast.scoring.engine.local import LocalEngine
from lipfast.scoring.order import pieces
from lipfast.scoring.reading import Reading
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.schema import Row
from lipfast.scoring.where import Where
from lipfast.text import counted, first_line

PIECE_FILES = 256
"""Checkpoints that a worker takes at a time: what is done again when it is lost."""

_LOSSES = 3  # of one piece before it is cut, and of one checkpoint before it is given up
_GIVEN_BACK = 5.0  # seconds in which a cluster notices what earlier workers have given back
_PROBED = 16  # files that every machine is asked to see


@dataclass
class Piece:
    """Work for one worker.

    Attributes:
        files: of whole runs, as far as they are short enough.
        losses: workers that were lost on it.
    """

    files: list[CheckpointFile]
    losses: int = 0


@dataclass(frozen=True)
class Result:
    """What a worker sends back.

    Attributes:
        rows: of the piece.
        left_out: checkpoints that `where` left out.
        seconds: time by stage, of this piece.
    """

    rows: list[Row]
    left_out: int
    seconds: dict[str, float]


class Worker:
    """A Ray actor: scores pieces with the local engine, one after another.

    Its plans and the data stay in memory from one piece to the next. It writes nothing: rows of a
    piece go back together, so that a lost worker leaves nothing half done.

    Args:
        recipe: how to score.
        memory: bytes of checkpoints to hold at most.
        where: which checkpoints, by their metadata.
        folder: the driver's current folder, from which architectures are imported.
        version: the driver's lipfast, which this machine must have as well.
    """

    def __init__(
        self,
        recipe: Recipe,
        memory: int,
        where: Where,
        *,
        folder: str,
        version: str,
    ) -> None:
        torch.set_num_threads(1)  # as many as it has CPUs
        with suppress(OSError):
            os.chdir(folder)
        self._engine: LocalEngine | None = None
        self._error: LipfastError | None = None
        if version != __version__:
            self._error = ArgumentError(
                f"the machine {platform.node()} of the Ray cluster has lipfast {__version__}, this "
                f"one {version}: install the same on all of them"
            )
            return
        try:
            self._engine = LocalEngine(recipe.scorer(), memory, where)
        except LipfastError as error:  # an actor that cannot be made says less than its answer
            self._error = error
            if recipe.device != "cpu":
                machine = f"the machine {platform.node()} of the Ray cluster"
                self._error = ArgumentError(f"{machine}: {error}")

    def score(self, files: list[CheckpointFile]) -> Result | LipfastError:
        """Score a piece; an error of the architecture is an answer too."""
        if self._engine is None:
            return self._error or ArgumentError("the worker could not be made")
        engine = self._engine
        left_out, before = engine.left_out, Counter(engine.seconds)
        try:
            rows = [row for batch in engine.run(files) for row in batch]
        except LipfastError as error:
            return type(error)(*error.args)
        seconds = {stage: value - before[stage] for stage, value in engine.seconds.items()}
        return Result(rows, engine.left_out - left_out, seconds)


class RayEngine:
    """Hands pieces of an archive to the workers of a Ray cluster.

    A piece goes to one worker, and again to another if that one is lost. Its rows come back
    together or not at all, so none is counted or stored twice. A piece on which several workers
    were lost is cut; a single checkpoint on which they were becomes an error row.

    Args:
        recipe: how to score.
        memory: bytes of checkpoints that each worker holds at most.
        where: which checkpoints, by their metadata.
        workers: how many; None for one per CPU of the cluster that is free, or per GPU if workers
            compute on CUDA.

    Attributes:
        left_out: how many checkpoints `where` left out so far.
        workers: how many there are at most.
        device: that they compute on, for the reader.

    Raises:
        ArgumentError: Ray is not installed, or cannot be reached; the recipe's device is not one
            that workers can have, or they are more than the cluster has room for.
    """

    def __init__(self, recipe: Recipe, memory: int, where: Where, workers: int | None) -> None:
        self.left_out = 0
        self._seconds: Counter[str] = Counter()
        self._running: dict[Any, tuple[Any, Piece]] = {}
        self._idle: list[Any] = []
        self._ray = import_ray()
        self._started = not self._ray.is_initialized()
        if self._started:
            connect(self._ray)
        self._memory, self._where = memory, where
        try:
            self._recipe = replace(recipe, device=_device_of_workers(self._ray, recipe.device))
            on_gpus = self._recipe.device != "cpu"
            self._resources = {"num_cpus": 1.0} | ({"num_gpus": 1.0} if on_gpus else {})
            self.workers = _room(self._ray, workers, "GPU" if on_gpus else "CPU")
        except LipfastError:
            self.close()
            raise
        self.device = "cuda, one GPU for each worker" if on_gpus else "cpu"
        self._shared = self._ray.put(self._recipe)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time by stage, summed over workers."""
        return self._seconds

    def run(self, files: Sequence[CheckpointFile]) -> Generator[list[Row], None, None]:
        """Yield the rows of the files, a piece at a time, in the order in which they are done.

        Raises:
            ArchiveError: a machine of the cluster cannot see the files.
            LipfastError: the architecture or the data is wrong.
        """
        self._require_visible(files)
        size = max(1, min(PIECE_FILES, -(-len(files) // (2 * self.workers))))
        waiting = deque(Piece(piece) for piece in pieces(files, size))
        while waiting or self._running:
            while waiting and len(self._running) < self.workers:
                self._submit(waiting.popleft())
            (done, *_), _ = self._ray.wait(list(self._running), num_returns=1)
            worker, piece = self._running.pop(done)
            try:
                result = self._ray.get(done)
            except self._ray.exceptions.RayActorError as error:
                yield from self._lost(piece, waiting, error)
                continue
            self._idle.append(worker)
            if isinstance(result, LipfastError):
                raise result
            self.left_out += result.left_out
            self._seconds.update(result.seconds)
            yield result.rows

    def close(self) -> None:
        """End the workers, and the cluster if this engine started it."""
        for worker in [*self._idle, *(worker for worker, _ in self._running.values())]:
            with suppress(Exception):
                self._ray.kill(worker)
        if self._started:
            self._ray.shutdown()

    def _submit(self, piece: Piece) -> None:
        worker = self._idle.pop() if self._idle else self._make()
        self._running[worker.score.remote(piece.files)] = (worker, piece)

    def _make(self) -> Any:
        actor = self._ray.remote(**self._resources)(Worker)
        return actor.remote(
            self._shared, self._memory, self._where, folder=str(Path.cwd()), version=__version__
        )

    def _lost(
        self, piece: Piece, waiting: deque[Piece], error: Exception
    ) -> Generator[list[Row], None, None]:
        """Put the work of a lost worker back; what kills worker after worker becomes a row."""
        piece.losses += 1
        if piece.losses < _LOSSES:
            waiting.appendleft(piece)
        elif len(piece.files) > 1:
            half = len(piece.files) // 2
            parts = (piece.files[:half], piece.files[half:])
            waiting.extendleft(Piece(part, _LOSSES - 1) for part in parts)
        else:
            yield [_lost_row(self._recipe, piece.files[0], first_line(error))]

    def _require_visible(self, files: Sequence[CheckpointFile]) -> None:
        """Refuse files that only this process or this machine can see."""
        for file in files:
            if "memory://" in file.uri:
                raise ArchiveError(
                    f"'{file.uri}' lies in the memory of this process, where workers cannot see "
                    "it. Copy the archive to a shared folder or an object store"
                )
        local = [file for file in files if file.filesystem is None or "file://" in file.uri]
        probed = local[:: max(1, len(local) // _PROBED)]
        for machine, index in unseen(self._ray, [_container(file) for file in probed]):
            raise ArchiveError(
                f"the machine {machine} of the Ray cluster cannot see '{probed[index].uri}', or "
                "sees another file there. Put the archive into a folder that all machines mount, "
                "or give the URL of an object store"
            )


def _device_of_workers(ray: Any, device: str) -> str:
    """What a worker computes on: a GPU of its own is always its `cuda`.

    Raises:
        ArgumentError: a certain GPU is asked for, or there are none.
    """
    gpus = ray.cluster_resources().get("GPU", 0)
    if device == AUTO:
        return "cuda" if gpus and cuda_info() is not None else "cpu"
    if device not in ("cpu", "cuda"):
        raise ArgumentError(
            f"device {device} with engine 'ray': every worker has a GPU of its own, say cuda"
        )
    if device == "cuda" and not gpus:
        raise ArgumentError(
            "device cuda: the Ray cluster has no GPU. Start it with some (ray start --num-gpus), "
            "or use --device cpu"
        )
    return device


def _room(ray: Any, workers: int | None, kind: str) -> int:
    """How many workers there are; each takes a CPU, and those on CUDA a GPU.

    Actors that find no room wait for ever, so that too many are refused at once.

    Raises:
        ArgumentError: there is not enough for so many.
    """
    wanted, until = workers or 1, time.monotonic() + _GIVEN_BACK
    there, _ = _fewest(ray.cluster_resources(), kind)
    free, rare = _fewest(ray.available_resources(), kind)
    while free < wanted <= there and time.monotonic() < until:
        time.sleep(_GIVEN_BACK / 50)
        free, rare = _fewest(ray.available_resources(), kind)
    if free >= wanted:
        return workers or free
    have = counted(int(ray.cluster_resources().get(rare, 0)), rare)
    raise ArgumentError(
        f"{counted(wanted, 'worker')} of one {rare} each: the Ray cluster has {have}, {free} of "
        "them free. Ask for fewer with --workers, add machines to the cluster, or wait until "
        "others are done with it"
    )


def _fewest(resources: Mapping[str, float], kind: str) -> tuple[int, str]:
    """Of CPUs and `kind`, of which every worker takes one, the rarer: how many, and which."""
    return min((int(resources.get(name, 0)), name) for name in dict.fromkeys((kind, "CPU")))


def _container(file: CheckpointFile) -> str:
    """The local path of a file, or of the zip or tar file that it lies in."""
    if file.filesystem is None:
        return file.path
    return file.uri.rpartition("::")[2].removeprefix("file://")


def _lost_row(recipe: Recipe, file: CheckpointFile, reason: str) -> Row:
    error = WorkerLostError(f"{file.uri}: every worker that tried it was lost: {reason}")
    return replace(recipe, device="cpu").scorer().failed(Reading(file, None, error, 0.0))


class WorkerLostError(LipfastError):
    """Workers end, one after another, on the same checkpoint."""
