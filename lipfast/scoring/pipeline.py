"""Score an archive: find, choose, skip what is done, bound in batches, store."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace

import torch

from lipfast.checkpoints import CheckpointFile, find_checkpoints
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.names import is_state_file
from lipfast.checkpoints.source import Archive
from lipfast.checkpoints.unnamed import by_ending
from lipfast.errors import ArgumentError
from lipfast.estimators.options import UpperMethod, check_method
from lipfast.norms import AnyNorm, check_norm
from lipfast.scoring.architectures import ArchSource
from lipfast.scoring.data import DataSource, load_data
from lipfast.scoring.done import completed
from lipfast.scoring.engine import Engine
from lipfast.scoring.engine.local import LocalEngine
from lipfast.scoring.engine.ray import RayEngine
from lipfast.scoring.options import Options
from lipfast.scoring.recipe import Recipe
from lipfast.scoring.run import Run
from lipfast.scoring.selection import Selection
from lipfast.scoring.store import store_folder
from lipfast.scoring.summary import Progress, Summary
from lipfast.scoring.watch import looks
from lipfast.scoring.write_behind import WriteBehind

ENGINES = ("local", "ray")
MEMORY = 1 << 30


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in the middle of a run, once everything done is committed.

    Attributes:
        summary: what was done.
    """

    def __init__(self, summary: Summary) -> None:
        super().__init__("interrupted; what was done is kept, the same call goes on")
        self.summary = summary


def score(
    archive: Archive | Sequence[Archive],
    *,
    arch: ArchSource,
    data: DataSource,
    out: str | os.PathLike[str],
    engine: str = "local",
    norm: AnyNorm = 2,
    upper: UpperMethod = "product",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    arch_args: Mapping[str, Scalar] | None = None,
    limit: int | None = None,
    memory: int = MEMORY,
    dry_run: bool = False,
    pattern: str | None = None,
    where: str | Sequence[str] = (),
    every: int = 1,
    prefix: str | None = None,
    retry_failed: bool = False,
    watch: float | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
) -> Summary:
    """Bound the Lipschitz constant of every checkpoint of an archive, from both sides.

    One row per checkpoint goes into the store `out`: the certified upper bound (a product of
    certified operator norms, bracketed layer by layer), the certified secant lower bound, and
    maximum, mean and RMS over the samples of the Jacobian's norm (Khromov and Singh, ICLR 2024).
    A checkpoint that cannot be scored is a row with `status="error"` and the reason, and the run
    goes on. Checkpoints that the store has already, with the same size, modification time, plan,
    options and data, are skipped, and so are those whose failure would repeat itself. Killed at any
    moment, the store keeps what was committed, and the same call resumes.

    Args:
        archive: a file, a folder, a glob, a zip or tar file, a manifest or an fsspec URL of
            `.safetensors`, `.pt`, `.pth` or `.ckpt` files, or several of these. Files are
            untrusted: code inside is never run.
        arch: `module:function`, or the function itself, whose keyword arguments are filled from
            each checkpoint's metadata; or a module; or a `.pt2` file of `torch.export.save`.
        data: the samples, along the first dimension: `FILE[:key]`, a name such as
            `mnist1d:train`, or a tensor.
        out: the store's folder.
        engine: `"local"`: this process; `"ray"`: workers of a Ray cluster.
        norm: of inputs and outputs: 1, 2 or inf.
        upper: how upper bounds are got: `"product"`, or `"quadratic"` for the smaller of that and
            quadratic constraints (norm 2; chains of matrices and entrywise ops), which start from
            the multipliers of a run's checkpoint in the batch before.
        batch_size: checkpoints of one architecture that are bounded in one call; by default 64, and
            on a CUDA device 1,024, as far as its memory goes.
        seed: seed of the start vectors.
        progress: called after every batch.
        arch_args: keyword arguments that go before the metadata.
        limit: score at most so many checkpoints.
        memory: bytes of checkpoints to hold at most, by each worker.
        dry_run: read and check every checkpoint and estimate the time; write nothing.
        pattern: metadata from paths, such as `{run}/step_{step:d}.pt`.
        where: conditions on the metadata, such as `step >= 1000`, that must all hold.
        every: of each run, only the first checkpoint and every so many after it.
        prefix: of those names in the files that belong to the architecture, such as `ema` or
            `state_dict.teacher`. Where several networks of a file fit, raw weights go before their
            averages, a student before its teacher, a generator before a discriminator, else the
            first does; the row's `note` and the summary say which, and what was not used.
        retry_failed: try those again whose failure would repeat itself.
        watch: look for new checkpoints again and again, every so many seconds, until interrupted.
        workers: of the Ray engine; by default one for every CPU of the cluster that is free, and on
            CUDA devices one for every GPU.
        device: where bounds are computed: `"cpu"`; `"cuda"` or `"cuda:1"`; `"auto"`: CUDA where it
            can be used. The summary says which. Brackets of layers are as narrow on a device, and
            bounds certified alike; values differ within them.

    Returns:
        Counts, reasons of failures, time by stage.

    Raises:
        ArgumentError: an option, the architecture or the data is wrong; no checkpoint fits them;
            the device cannot be used; the cluster has fewer CPUs or GPUs than workers.
        DeviceLostError: the device failed; what was scored before is committed.
        ArchiveError: the archive is missing, or holds no checkpoints.
        NonFiniteError: a sample holds NaN or infinity.
        StoreError: the store cannot be read or written.
        Interrupted: after Ctrl-C, a KeyboardInterrupt with the `summary` of what was done, all of
            it committed.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from lipfast import read_scores, score
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> def mlp(width: int) -> nn.Module:
        ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for width in (4, 8):
        ...     save_file(
        ...         mlp(width).state_dict(),
        ...         folder / f"width{width}.safetensors",
        ...         metadata={"width": str(width)},
        ...     )
        >>> x = torch.linspace(-1, 1, 12).reshape(3, 4)
        >>> summary = score(folder, arch=mlp, data=x, out=folder / "scores")
        >>> summary.scored, summary.failed
        (2, 0)
        >>> table = read_scores(folder / "scores").to_pydict()
        >>> table["meta.width"], [a <= b for a, b in zip(table["lower"], table["upper"])]
        ([4, 8], [True, True])
    """
    started = time.perf_counter()
    _check(engine, seed, watch, batch_size=batch_size, limit=limit, memory=memory, workers=workers)
    selection = Selection.parse(pattern, where, every)
    check_method(upper, 1, check_norm(norm))
    options = Options(check_norm(norm), seed, batch_size, memory, prefix, upper)
    summary = Summary(store=str(store_folder(out)), dry_run=dry_run)

    def find() -> list[CheckpointFile]:
        with _timed(summary, "find"):
            aside: set[str] = set()
            files = find_checkpoints(archive, may_be_empty=watch is not None, aside=aside)
            states = {path for path in aside if is_state_file(path.rpartition("/")[2])}
            summary.aside, summary.not_looked_at = len(states), by_ending(aside - states)
            return selection.described(files)

    with _timed(summary, "setup"):
        recipe = Recipe(arch, arch_args, load_data(data), options, str(device))
        # Workers have devices of their own; this process only asks what is done.
        shared = engine == "ray" and not dry_run
        scorer = (replace(recipe, device="cpu") if shared else recipe).scorer(bounds=not dry_run)
        run = Run(summary, scorer, selection, completed(out), limit, progress, retry_failed)
    if shared:
        work: Engine = RayEngine(recipe, memory, selection.where, workers)
    else:
        work = LocalEngine(scorer, memory, selection.where)
    summary.device = work.device
    interrupt: KeyboardInterrupt | None = None
    store = None
    try:
        with closing(work), nullcontext(None) if dry_run else WriteBehind(out) as store:
            for files in [find()] if watch is None else looks(find, watch):
                run.score(run.left(files), work, store)
                if run.finished:
                    break
    except KeyboardInterrupt as pressed:  # what was done is committed by now
        interrupt = pressed
    run.close(work)
    summary.estimate = scorer.estimate if dry_run else None
    summary.seconds["write"] = 0.0 if store is None else store.seconds
    summary.seconds["total"] = time.perf_counter() - started
    if interrupt is not None:
        raise Interrupted(summary) from interrupt
    return summary


def _check(engine: str, seed: int, watch: float | None, **counts: int | None) -> None:
    if engine not in ENGINES:
        raise ArgumentError(f"engine '{engine}': expected {' or '.join(ENGINES)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed {seed!r}: expected a non-negative integer of 64 bits")
    if watch is not None and not (isinstance(watch, (int, float)) and 0 < watch < math.inf):
        raise ArgumentError(f"watch {watch!r}: expected seconds, more than 0")
    for name, value in counts.items():
        if value is not None and not isinstance(value, int):
            raise ArgumentError(f"{name} {value!r}: expected an integer")
        if value is not None and value < 1:
            raise ArgumentError(f"{name} {value}: expected at least 1")


@contextmanager
def _timed(summary: Summary, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    summary.seconds[stage] = summary.seconds.get(stage, 0.0) + time.perf_counter() - started
