"""Which file names are checkpoints, which are parts of one, and which lie beside one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache

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

DISTRIBUTED = ".metadata"
"""Name of the index of a folder that `torch.distributed.checkpoint` wrote."""

SLICES = ".distcp"
"""Ending of its other files."""

MODEL_STATES = "_model_states.pt"
"""Ending of the files in which DeepSpeed keeps weights."""

COMPANIONS = ("meta.pt", "common.pt")
"""What trainers write beside its slices: epoch, step and settings."""

_BIN = re.compile(r"pytorch_model[^/]*\.bin")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.(safetensors|bin)", re.IGNORECASE)
# What trainers keep beside the weights: states of optimizers, schedulers, generators and samplers.
# Of files that are called in another way, such as `image_sampler.pt`, the content says what it is.
_STATE_WORDS = (
    "(.*[-_.])?(optimi[sz]er|optim|rng_state|random_states?)"
    "|([-_.]|lr|grad|amp|loss|best|last|latest|final)*(scheduler|scaler)"
)
_STATES = re.compile(
    rf"({_STATE_WORDS})s?(_states?)?([-_.](\d+[km]?|last|latest|best|final))*"
    r"\.(pt|pth|bin|pkl|safetensors)"
    r"|sampler(_\d+)*\.(bin|pkl)"
    r"|.*_optim_states\.pt|opt\.(pt|pth)|(training_args|distrib_optim|trainer_state)\.(pt|bin)"
    r"|(training_args|dataloader|custom_checkpoint)(_\d+)*\.(bin|pkl)"
    # pieces of one checkpoint of DeepSpeed, which its first piece stands for
    r"|(bf16_|fp16_)?zero_pp_rank_0*[1-9]\d*_mp_rank_\d+_model_states\.pt"
    r"|mp_rank_0*[1-9]\d*_model_states\.pt|layer_\d+-model_\d+-model_states\.pt",
    re.IGNORECASE,
)
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
    named = name == DISTRIBUTED or lower.endswith((*SUFFIXES, *INDEX_SUFFIXES, SLICES))
    return named or _BIN.fullmatch(name) is not None


@lru_cache(maxsize=1 << 12)  # the files of many runs are called alike, and each is asked for often
def is_state_file(name: str) -> bool:
    """Say whether a file holds what trainers keep beside the weights, by its name.

    Example:
        >>> names = ("optimizer.pt", "best_optim_100.pth", "zero_pp_rank_0_optim_states.pt", "a.pt")
        >>> [is_state_file(name) for name in names]
        [True, True, True, False]
    """
    return _STATES.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """Say whether the file lists the shards of a checkpoint, in a JSON file."""
    return name.lower().endswith(INDEX_SUFFIXES)


def checkpoints_of(names: Collection[str]) -> Iterator[str]:
    """Pick the checkpoints of a folder, given the names of all its files, sorted.

    Shards whose index is there, states of optimizers and hidden files are no checkpoints. The index
    of `torch.distributed.checkpoint` stands for its folder.

    Example:
        >>> shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        >>> list(checkpoints_of([*shards, "model.safetensors.index.json", "optimizer.pt"]))
        ['model.safetensors.index.json']
    """
    indexed = {_index_stem(name) for name in names if is_index(name)}
    distributed = is_distributed(names)
    if distributed:
        yield DISTRIBUTED
    for name in sorted(names):
        if name.startswith(".") or not is_checkpoint(name) or is_state_file(name):
            continue
        if distributed and (name.endswith(SLICES) or name in COMPANIONS):
            continue
        shard = _SHARD.fullmatch(name)
        if shard is None or shard["stem"] not in indexed:
            yield name


def stands_for(name: str, names: Collection[str]) -> str:
    """Return the file that is read for a file: the index, for slices of one checkpoint."""
    return DISTRIBUTED if name.endswith(SLICES) and DISTRIBUTED in names else name


def is_distributed(names: Collection[str]) -> bool:
    """Say whether the files of a folder are one checkpoint of `torch.distributed.checkpoint`."""
    return DISTRIBUTED in names and any(name.endswith(SLICES) for name in names)


def shards_of(index: str, names: Collection[str]) -> list[str]:
    """Pick the shards that belong to an index file by their names; no other file has any."""
    if index == DISTRIBUTED:
        return sorted(name for name in names if name.endswith(SLICES))
    if index.startswith("zero_pp_rank_0_") and index.endswith(MODEL_STATES):
        return sorted(name for name in names if "zero_pp_rank_" in name and name != index)
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
