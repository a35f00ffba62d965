"""Read a sharded checkpoint: an index that says in which file each tensor is."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from lipfast.checkpoints.access import read_json
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.safetensors_file import read_safetensors
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.torch_file import read_torch
from lipfast.checkpoints.wrapped import Content
from lipfast.errors import CheckpointError

_MAX_INDEX = 16 << 20  # bytes
_MAX_SHARDS = 4096


def read_sharded(file: CheckpointFile) -> Content:
    """Read all shards that an index names.

    Shards lie beside the index: names with a path in them are refused, since an index is untrusted
    and must not reach other folders.

    Raises:
        CheckpointError: the index is malformed, or a shard does not hold what the index says.
        OSError: a shard cannot be read.
    """
    index = _index(file)
    places = _places(file, index)
    folder = file.path.rpartition("/")[0]
    tensors: dict[str, Tensor] = {}
    raw: dict[str, Scalar] = {}
    unread: dict[str, str] = {}
    for shard, names in places.items():
        path = f"{folder}/{shard}" if folder else shard
        read = read_safetensors if shard.lower().endswith(".safetensors") else read_torch
        try:
            found = Content(*read(file, path, _size_of(file, path)))
        except FileNotFoundError as error:
            raise CheckpointError(f"{file.uri}: its shard '{shard}' is missing") from error
        except CheckpointError as error:
            reason = str(error).removeprefix(f"{file.uri}: ")
            raise CheckpointError(f"{file.uri}: its shard '{shard}': {reason}") from error
        held = {*found.tensors, *found.unread}
        missing = [name for name in names if name not in held]
        if missing:
            raise CheckpointError(
                f"{file.uri}: its shard '{shard}' lacks '{missing[0]}', which the index promises"
            )
        tensors |= {name: found.tensors[name] for name in names if name in found.tensors}
        unread |= found.unread
        raw |= found.raw
    metadata = index.get("metadata")
    raw |= scalars(metadata.items(), tensors=False) if isinstance(metadata, dict) else {}
    return Content(tensors, raw, unread=unread)


def _index(file: CheckpointFile) -> dict[str, Any]:
    content = read_json(file, file.path, _MAX_INDEX, f"{file.uri}:")
    if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
        raise CheckpointError(f"{file.uri}: no index of shards: it has no 'weight_map'")
    return content


def _places(file: CheckpointFile, index: dict[str, Any]) -> dict[str, list[str]]:
    """Map each shard to the tensors that it must hold."""
    places: dict[str, list[str]] = {}
    for name, shard in index["weight_map"].items():
        if not isinstance(shard, str) or not shard.lower().endswith((".safetensors", ".bin")):
            raise CheckpointError(f"{file.uri}: '{name}' lies in {shard!r:.200}, which is no shard")
        if any(c in shard for c in "/\\\0") or shard.startswith("."):
            raise CheckpointError(
                f"{file.uri}: its shard {shard!r:.200} has a path in its name; shards lie beside "
                "the index"
            )
        places.setdefault(shard, []).append(name)
    if len(places) > _MAX_SHARDS:
        raise CheckpointError(f"{file.uri}: {len(places)} shards; expected at most {_MAX_SHARDS}")
    return dict(sorted(places.items()))


def _size_of(file: CheckpointFile, path: str) -> int:
    return 0 if file.filesystem is not None else os.stat(path).st_size  # noqa: PTH116
