"""Read what DeepSpeed writes: whole weights, or those that ZeRO-3 spread over its ranks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.checkpoints.access import names_beside
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.pickled_tensors import are_counts
from lipfast.checkpoints.pickled_values import MAX_DIMS
from lipfast.checkpoints.torch_file import collected, load_harmless
from lipfast.checkpoints.wrapped import Content
from lipfast.errors import CheckpointError

_STATES_OF_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_OTHER_PIECE = re.compile(
    r"(?:zero_pp_rank_0_)?mp_rank_(?:0*[1-9]\d*(?:_\d+)?|0+_0*[1-9]\d*)(?:_model_states\.pt)?"
)
_PIPELINE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
_GROUPS = "fp32_flat_groups"
_HOW = "run zero_to_fp32.py, which DeepSpeed puts beside it, and score the file that it writes"


def read_deepspeed(file: CheckpointFile) -> Content:
    """Read the weights of one `*_model_states.pt`.

    Of ZeRO-3 the float32 weights are put together from the optimizer states of all ranks.

    Raises:
        CheckpointError: it is damaged; parts of other ranks are missing; tensor or pipeline
            parallelism cut the weights, which lipfast does not put together.
        OSError: it cannot be read.
    """
    names = names_beside(file)
    if any(map(_PIPELINE.fullmatch, names)):
        raise CheckpointError(
            f"{file.uri}: pipeline parallelism spread the layers over the files beside it, which "
            "lipfast does not put together. Merge them with DeepSpeed's tools (ds_to_universal.py)"
        )
    require_one_piece(file, names)
    content = load_harmless(file, file.path, file.size)
    if not isinstance(content, Mapping) or not _spread(content):
        return collected(file, content)
    ranks = sorted(
        (int(found[1]), found[0]) for found in map(_STATES_OF_RANK.fullmatch, names) if found
    )
    try:
        if not ranks or [rank for rank, _ in ranks] != list(range(len(ranks))):
            raise ValueError("the optimizer states of its ranks are missing, or there twice")
        merged = _merged(file, content, [name for _, name in ranks])
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file.uri}: weights of ZeRO-3 that lipfast cannot put together "
            f"({type(error).__name__}: {str(error)[:200]}): {_HOW}"
        ) from error
    return collected(file, {**content, "module": merged})


def require_one_piece(file: CheckpointFile, names: Sequence[str]) -> None:
    """Refuse a checkpoint of which tensor parallelism (DeepSpeed, Megatron) left several pieces.

    Args:
        file: the checkpoint.
        names: of all files, or folders, beside it.

    Raises:
        CheckpointError: there is more than one piece.
    """
    pieces = sum(_OTHER_PIECE.fullmatch(name) is not None for name in names)
    if pieces:
        raise CheckpointError(
            f"{file.uri}: one of {pieces + 1} pieces into which model parallelism cut the weights, "
            "which lipfast does not put together. Merge them with the tools of the trainer "
            "(Megatron: tools/checkpoint/convert.py; DeepSpeed: ds_to_universal.py)"
        )


def _spread(content: Mapping[Any, Any]) -> bool:
    """Whether the weights are elsewhere: ZeRO-3 leaves empty tensors in their places."""
    module = content.get("module")
    values = module.values() if isinstance(module, Mapping) else ()
    return any(isinstance(value, Tensor) and not value.numel() for value in values)


def _merged(
    file: CheckpointFile, content: Mapping[Any, Any], names: Sequence[str]
) -> dict[str, Tensor]:
    """The whole parameters: each rank holds one part of each, padded to equal lengths."""
    if content.get("frozen_param_shapes"):
        raise ValueError("some of its parameters are frozen")
    shapes = _parameter_shapes(content["param_shapes"])
    expected = sum(-(-math.prod(shape) // len(names)) for shape in shapes.values())
    left = file.size
    flat = []
    for name in names:
        states = _states(file, name, len(names), content.get("dp_world_size"))
        flat.append(_flat_groups(states, expected, left))
        left -= flat[-1].nbytes
    merged: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        if not count:
            merged[name] = flat[0].new_empty(shape)
            continue
        length = -(-count // len(flat))
        parts = [part.narrow(0, at, length) for part in flat]
        merged[name] = torch.cat(parts)[:count].view(shape)
        at += length
    module = content["module"]
    for name in map(_as_name, _as_list(content.get("buffer_names") or ())):
        if name in module:
            merged[name] = module[name]
    pairs = content.get("shared_params") or {}
    for name, other in pairs.items() if isinstance(pairs, Mapping) else _as_list(pairs):
        merged[_as_name(name)] = merged[_as_name(other)]
    # others that are whole: no weights of ZeRO-3, but perhaps of the function
    whole = ((name, one) for name, one in module.items() if isinstance(one, Tensor) and one.numel())
    return {**{name: one for name, one in whole if name not in merged}, **merged}


def _parameter_shapes(groups: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for group in _as_list(groups):
        for name, shape in group.items():
            if _as_name(name) in shapes:  # or one group is there over and over
                raise ValueError("a parameter is named twice")
            is_shape = isinstance(shape, tuple) and len(shape) <= MAX_DIMS
            if not is_shape or not are_counts(shape):
                raise ValueError(f"'{name[:100]}' has no shape")
            shapes[name] = shape
    return shapes


def _states(file: CheckpointFile, name: str, ranks: int, world: Any) -> Mapping[Any, Any]:
    """The optimizer states of one rank, where they say that there are so many ranks."""
    folder = file.path.rpartition("/")[0]
    content = load_harmless(file, f"{folder}/{name}", file.size, wanted=_groups_of)
    found = content["optimizer_state_dict"]
    count = found.get("partition_count", world)  # of each group of parameters, or of all
    counts = count if isinstance(count, (list, tuple)) else (ranks if count is None else count,)
    if not are_counts(tuple(counts)) or set(counts) != {ranks}:
        raise ValueError(f"'{name}' says that there are {counts} ranks, {ranks} are there")
    return found  # type: ignore[no-any-return]


def _groups_of(content: Any) -> Sequence[Any]:
    return _as_list(content["optimizer_state_dict"][_GROUPS])  # type: ignore[no-any-return]


def _flat_groups(states: Mapping[Any, Any], expected: int, left: int) -> Tensor:
    """All float32 parameters of one rank, one after the other, where they are as many."""
    groups = _as_list(states[_GROUPS])
    count = sum(group.numel() for group in groups)
    if count != expected:
        raise ValueError(f"{expected} numbers of each rank are named, {count} are there")
    if sum(group.nbytes for group in groups) > left:  # one may be there over and over
        raise ValueError(f"its ranks name more numbers than their {left} bytes hold")
    return torch.cat([group.detach().reshape(-1) for group in groups])


def _as_list(value: Any) -> Any:
    """A list: to go through a tensor would make one of each of its numbers."""
    if not isinstance(value, (list, tuple)):
        raise TypeError("no list")
    return value


def _as_name(name: Any) -> str:
    """A name. Other objects may take for ever to hash."""
    if type(name) is not str:
        raise TypeError("a name that is no text")
    return name
