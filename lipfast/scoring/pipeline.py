"""Score an archive: find, skip what is done, bound in batches, store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from lipfast.checkpoints import CheckpointFile, find_checkpoints
from lipfast.checkpoints.metadata import Value
from lipfast.checkpoints.source import Archive
from lipfast.errors import ArgumentError, LipfastError
from lipfast.rules.registry import Norm, check_norm
from lipfast.scoring.architectures import Architecture, ArchSource
from lipfast.scoring.data import DataSource, load_data
from lipfast.scoring.engine import local
from lipfast.scoring.scorer import Options, Scorer
from lipfast.scoring.store import Row, StoreWriter, completed, store_folder
from lipfast.scoring.summary import Progress, Summary

ENGINES = ("local",)
MEMORY = 1 << 30


def score(
    archive: Archive | Sequence[Archive],
    *,
    arch: ArchSource,
    data: DataSource,
    out: str | os.PathLike[str],
    engine: str = "local",
    norm: Norm = 2,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    arch_args: Mapping[str, Value] | None = None,
    limit: int | None = None,
    memory: int = MEMORY,
    dry_run: bool = False,
) -> Summary:
    """Bound the Lipschitz constant of every checkpoint of an archive, from both sides.

    One row per checkpoint goes into the store `out`: the certified upper bound (a product of
    certified operator norms, bracketed layer by layer), the certified secant lower bound, and
    maximum, mean and RMS over the samples of the Jacobian's norm (Khromov and Singh, ICLR 2024).
    A checkpoint that cannot be scored is a row with `status="error"` and the reason, and the run
    goes on. Checkpoints that the store has already, with the same size, modification time, plan,
    options and data, are skipped; failed ones are tried again. Killed at any moment, the store
    keeps what was committed, and the same call resumes.

    Args:
        archive: a file, a folder, a glob or an fsspec URL of `.safetensors`, `.pt` or `.pth`
            files, or several of these. Files are untrusted: code inside is never run.
        arch: `module:function`, or the function itself, whose keyword arguments are filled from
            each checkpoint's metadata; or a module; or a `.pt2` file of `torch.export.save`.
        data: the samples, along the first dimension: `FILE[:key]`, a name such as
            `mnist1d:train`, or a tensor.
        out: the store's folder.
        engine: `"local"`: this process.
        norm: of inputs and outputs: 1, 2 or inf.
        batch_size: checkpoints of one architecture that are bounded in one call.
        seed: seed of the start vectors.
        progress: called after every batch.
        arch_args: keyword arguments that go before the metadata.
        limit: score at most so many checkpoints.
        memory: bytes of checkpoints to hold at most.
        dry_run: read and check every checkpoint, but compute and write nothing.

    Returns:
        Counts, reasons of failures, time by stage.

    Raises:
        ArgumentError: an option, the architecture or the data is wrong; no checkpoint fits them.
        ArchiveError: the archive is missing, or holds no checkpoints.
        NonFiniteError: a sample holds NaN or infinity.
        StoreError: the store cannot be read or written.
        KeyboardInterrupt: after Ctrl-C, with everything done so far committed.

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
    _check(engine, seed, batch_size=batch_size, limit=limit, memory=memory)
    options = Options(check_norm(norm), seed, batch_size, memory)
    summary = Summary(store=str(store_folder(out)), dry_run=dry_run)
    with _timed(summary, "find"):
        files = find_checkpoints(archive)
        summary.found = len(files)
    with _timed(summary, "setup"):
        scorer = Scorer(Architecture(arch, arch_args), load_data(data), options, not dry_run)
        todo = _not_done(files, out, scorer)
    summary.skipped = len(files) - len(todo)
    todo = todo[:limit]
    writer = nullcontext(None) if dry_run else StoreWriter(out)
    with writer as store:
        for rows in local.run(todo, scorer, memory):
            if store is not None:
                store.append(rows)
            _count(summary, rows)
            if progress is not None:
                done = summary.scored + summary.failed
                progress(Progress(done, len(todo), summary.failed, summary.skipped))
    summary.reasons = dict(scorer.reasons)
    summary.examples = dict(scorer.examples)
    summary.plans = scorer.architecture.compiled
    summary.seconds.update(scorer.seconds)
    if store is not None:
        summary.seconds["store"] = store.seconds
    summary.seconds["total"] = time.perf_counter() - started
    return summary


def _check(engine: str, seed: int, **counts: int | None) -> None:
    if engine not in ENGINES:
        raise ArgumentError(f"engine '{engine}': expected {' or '.join(ENGINES)}")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed {seed!r}: expected a non-negative integer of 64 bits")
    for name, value in counts.items():
        if value is not None and not isinstance(value, int):
            raise ArgumentError(f"{name} {value!r}: expected an integer")
        if value is not None and value < 1:
            raise ArgumentError(f"{name} {value}: expected at least 1")


def _not_done(
    files: Sequence[CheckpointFile], out: str | os.PathLike[str], scorer: Scorer
) -> list[CheckpointFile]:
    """Leave out the files whose row in the store still says what a new one would say."""
    done = completed(out)

    def is_done(file: CheckpointFile) -> bool:
        return any(
            fingerprint == _fingerprint(scorer, metadata)
            for fingerprint, metadata in done.get((file.uri, file.size, file.mtime), ())
        )

    return [file for file in files if not is_done(file)]


def _fingerprint(scorer: Scorer, metadata: str) -> str | None:
    try:
        return scorer.fingerprint(json.loads(metadata))
    except LipfastError:
        return None


def _count(summary: Summary, rows: Sequence[Row]) -> None:
    for row in rows:
        seconds = summary.seconds
        seconds["read"] = seconds.get("read", 0.0) + row["seconds_read"]
        if row["status"] == "ok":
            summary.scored += 1
        else:
            summary.failed += 1


@contextmanager
def _timed(summary: Summary, stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    summary.seconds[stage] = time.perf_counter() - started
