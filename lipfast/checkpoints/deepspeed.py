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
from lipfast.checkpoints.torch_file import collected, load_harmless
from lipfast.checkpoints.wrapped import Content
from lipfast.errors import CheckpointError

_STATES_OF_RANK = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_OTHER_PIECE = re.compile(
    r"(?:zero_pp_rank_0_)?mp_rank_(?:0*[1-9]\d*(?:_\d+)?|0+_0*[1-9]\d*)(?:_model_states\.pt)?"
)
_PIPELINE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")
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
    flat = [_flat_groups(file, name) for name in names]
    shapes = {
        name: tuple(shape) for group in content["param_shapes"] for name, shape in group.items()
    }
    merged: dict[str, Tensor] = {}
    at = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        length = -(-count // len(flat))
        parts = [part.narrow(0, at, length) for part in flat]
        merged[name] = torch.cat(parts)[:count].view(shape)
        at += length
    if any(at != part.numel() for part in flat):
        raise ValueError(f"{at} numbers of each rank are named, {flat[0].numel()} are there")
    module = content["module"]
    merged |= {name: module[name] for name in content.get("buffer_names") or () if name in module}
    pairs = content.get("shared_params") or {}
    for name, other in pairs.items() if isinstance(pairs, Mapping) else pairs:
        merged[name] = merged[other]
    return merged


def _flat_groups(file: CheckpointFile, name: str) -> Tensor:
    """All float32 parameters of one rank, one after the other."""
    folder = file.path.rpartition("/")[0]
    states = load_harmless(file, f"{folder}/{name}", file.size)["optimizer_state_dict"]
    return torch.cat([group.detach().reshape(-1) for group in states["fp32_flat_groups"]])
