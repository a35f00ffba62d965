"""Checkpoints of a sweep: weights and hyper-parameters in one `.safetensors` file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from experiments.files import write_whole


def checkpoint_name(step: int) -> str:
    """Return the file name of the checkpoint at `step`.

    Example:
        >>> checkpoint_name(100)
        'step_000100.safetensors'
    """
    return f"step_{step:06d}.safetensors"


def _metadata_text(value: object) -> str:
    """Metadata of safetensors are strings; booleans as in JSON, floats so that they round-trip."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_checkpoint(
    path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, object]
) -> None:
    """Write a checkpoint; it is there whole or not at all.

    Args:
        path: of the file; its folder exists.
        state_dict: parameter name to tensor.
        metadata: hyper-parameters and metrics; stored as strings, `True` as "true".
    """
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items()}
    write_whole(
        path, save(tensors, {key: _metadata_text(value) for key, value in metadata.items()})
    )


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a checkpoint, as strings."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
