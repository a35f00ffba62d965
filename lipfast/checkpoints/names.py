"""Which file names are checkpoints, which are parts of one, and which lie beside one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".pyth", ".th", ".pth.tar", ".pt.tar")
"""File name endings that mark a checkpoint."""

INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
"""Endings of the file that lists the shards of one checkpoint."""

MANIFEST_SUFFIXES = (".csv", ".jsonl", ".ndjson")
"""Endings of a file that lists checkpoints and their metadata."""

MAGIC = "*?["
"""Characters that make a path a glob."""

CONTAINERS = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
}
"""Endings of files that hold a folder, and the fsspec protocol that looks inside."""

_BIN = re.compile(r"pytorch_model[^/]*\.bin")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.(safetensors|bin)", re.IGNORECASE)
# What trainers keep beside the weights: optimizer, scheduler and generator states.
_STATES = re.compile(r"(optimizer|scheduler|scaler|rng_state(_\d+)?)\.(pt|pth|bin)")
_FOLDER_SIDECARS = (
    "metadata.json",
    "trainer_state.json",
    "hparams.json",
    "config.json",
    "args.json",
)


def is_checkpoint(name: str) -> bool:
    """Say whether a file of this name is read as a checkpoint when it is asked for by name.

    Example:
        >>> [is_checkpoint(n) for n in ("a.PT", "pytorch_model.bin", "training_args.bin")]
        [True, True, False]
    """
    lower = name.lower()
    return lower.endswith((*SUFFIXES, *INDEX_SUFFIXES)) or _BIN.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """Say whether the file lists the shards of a checkpoint."""
    return name.lower().endswith(INDEX_SUFFIXES)


def checkpoints_of(names: Collection[str]) -> Iterator[str]:
    """Pick the checkpoints of a folder, given the names of all its files, sorted.

    Shards whose index is there, states of optimizers and hidden files are no checkpoints.

    Example:
        >>> shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        >>> list(checkpoints_of([*shards, "model.safetensors.index.json", "optimizer.pt"]))
        ['model.safetensors.index.json']
    """
    indexed = {_index_stem(name) for name in names if is_index(name)}
    for name in sorted(names):
        if name.startswith(".") or not is_checkpoint(name) or _STATES.fullmatch(name):
            continue
        shard = _SHARD.fullmatch(name)
        if shard is None or shard["stem"] not in indexed:
            yield name


def shards_of(index: str, names: Collection[str]) -> list[str]:
    """Pick the shards that belong to an index file by their names; no other file has any."""
    if not is_index(index):
        return []
    stem = _index_stem(index)
    matches = ((name, _SHARD.fullmatch(name)) for name in names)
    return sorted(name for name, match in matches if match and match["stem"] == stem)


def sidecars_of(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Pick the JSON files with metadata of a checkpoint: its own first, then its folder's.

    Example:
        >>> sidecars_of("step1.pt", {"step1.json", "step2.json", "config.json"})
        ('step1.json', 'config.json')
    """
    stem = _index_stem(name) if is_index(name) else _stem(name)
    wanted = dict.fromkeys((f"{name}.json", f"{stem}.json", *_FOLDER_SIDECARS))
    return tuple(one for one in wanted if one in names)


def container_protocol(name: str) -> str | None:
    """Return the protocol that looks into a zip or tar file; None for other files."""
    lower = name.lower()
    return next((CONTAINERS[end] for end in CONTAINERS if lower.endswith(end)), None)


def _stem(name: str) -> str:
    """`PurePosixPath(name).stem` of a plain name, an archive's files being many."""
    dot = name.rfind(".")
    return name[:dot] if 0 < dot < len(name) - 1 else name


def _index_stem(index: str) -> str:
    lower = index.lower()
    return next((index[: -len(end)] for end in INDEX_SUFFIXES if lower.endswith(end)), index)
