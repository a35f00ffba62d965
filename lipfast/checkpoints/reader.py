"""Read a checkpoint's weights and metadata. Files are untrusted: no code in them is ever run."""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from lipfast.checkpoints.metadata import Metadata, Value
from lipfast.checkpoints.source import CheckpointFile
from lipfast.errors import CheckpointError

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the weights inside a larger dict."""

_SETTINGS = ("hyper_parameters", "hparams", "config", "args", "metadata", "metrics")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # at the start, or after a dot
_SMALL = 1 << 20  # bytes; below it one read of the whole file is faster than a mapping
_MAX_HEADER = 100_000_000  # bytes, as the safetensors format has it
_MAX_BITS = 1024  # of an integer in the metadata; json refuses very long ones
_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")
_UNPICKLER = re.compile(r"WeightsUnpickler error:\s*([^\n]+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        file: where it came from.
        state_dict: parameter name to tensor, on the CPU; names as without `torch.compile`.
        metadata: run, step, epoch, hyper-parameters and metrics.
    """

    file: CheckpointFile
    state_dict: dict[str, Tensor]
    metadata: Metadata


def read_checkpoint(file: CheckpointFile) -> Checkpoint:
    """Read one checkpoint.

    `.safetensors` files go through safetensors, `.pt` and `.pth` files through
    `torch.load(weights_only=True)`: code inside a file is never run. The weights may lie in a
    larger dict under one of `WRAPPERS`. Metadata is the header of a safetensors file,
    or whatever numbers, texts and booleans a `.pt` file holds beside the weights.

    Args:
        file: as `find_checkpoints` lists it.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or not plain weights; names the file, the
            reason, and what to do.

    Example:
        >>> import pathlib, tempfile
        >>> from safetensors.torch import save_file
        >>> from lipfast.checkpoints import find_checkpoints
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "step7.safetensors"
        >>> save_file({"weight": torch.eye(2)}, path, metadata={"step": "7"})
        >>> checkpoint = read_checkpoint(find_checkpoints(path)[0])
        >>> list(checkpoint.state_dict), checkpoint.metadata.step
        (['weight'], 7)
    """
    try:
        _require_regular(file)
        if file.suffix == ".safetensors":
            tensors, raw = _read_safetensors(file)
        else:
            tensors, raw = _read_torch(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.uri}: no such file: it was moved or deleted") from error
    except OSError as error:
        reason = error.strerror or f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{file.uri}: cannot be read: {reason}") from error
    if not tensors:
        raise CheckpointError(
            f"{file.uri}: holds no tensors; expected a state dict, as "
            f"torch.save(model.state_dict(), ...) writes it, or one under "
            f"{', '.join(repr(key) for key in WRAPPERS)}"
        )
    return Checkpoint(file, without_compiled(tensors), Metadata(raw, file.folder))


def without_compiled(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the level that `torch.compile` adds to parameter names, wherever it is.

    The prefix `module.` of `DataParallel` stays: a model may well have a child of that name, so
    only a plan can tell, and does.

    Example:
        >>> list(without_compiled({"_orig_mod.encoder._orig_mod.weight": torch.zeros(1)}))
        ['encoder.weight']
    """
    return {_COMPILED.sub("", name): tensor for name, tensor in state_dict.items()}


def _require_regular(file: CheckpointFile) -> None:
    """Refuse pipes and devices: reading one may wait for ever."""
    if file.filesystem is None and not stat.S_ISREG(os.stat(file.path).st_mode):  # noqa: PTH116
        raise CheckpointError(f"{file.uri}: not a regular file, so it cannot be a checkpoint")


def _read_bytes(file: CheckpointFile) -> bytes:
    if file.filesystem is None:
        with open(file.path, "rb") as stream:  # noqa: PTH123 (fast)
            return stream.read()
    try:
        return bytes(file.filesystem.cat_file(file.path))
    except OSError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise OSError(f"{type(error).__name__}: {error}") from error


# safetensors


def _read_safetensors(file: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, Value]]:
    try:
        if file.filesystem is None and file.size > _SMALL:
            with open(file.path, "rb") as stream:  # noqa: PTH123
                raw = _header_metadata(file, stream.read(8), stream, file.size)
            return safetensors.torch.load_file(file.path), raw
        data = _read_bytes(file)
        raw = _header_metadata(file, data[:8], io.BytesIO(data[8:]), len(data))
        return safetensors.torch.load(data), raw
    except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise _not_safetensors(file, str(error)) from error


def _header_metadata(
    file: CheckpointFile, length: bytes, rest: io.BufferedIOBase, size: int
) -> dict[str, Value]:
    """Read the header's `__metadata__`: eight bytes of length, then that much JSON."""
    header_size = int.from_bytes(length, "little")
    if len(length) < 8 or not 2 <= header_size <= min(size - 8, _MAX_HEADER):
        raise _not_safetensors(file, f"its header does not fit into its {size} bytes")
    header = json.loads(rest.read(header_size))
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        return {}
    return {str(key): str(value) for key, value in metadata.items()}


def _not_safetensors(file: CheckpointFile, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file.uri}: truncated, or not a safetensors file: {reason}. Copy or save it again"
    )


# torch.save


def _read_torch(file: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, Value]]:
    content = _load_torch(file)
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file.uri}: holds a {type(content).__name__}; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it"
        )
    weights = next((content[key] for key in WRAPPERS if _holds_tensors(content.get(key))), None)
    if weights is None:
        raw = _scalars(content.items(), tensors=False)
        weights = content
    else:
        raw = _scalars(content.items(), tensors=True)
    return {str(k): v.detach() for k, v in weights.items() if isinstance(v, Tensor)}, raw


def _load_torch(file: CheckpointFile) -> Any:
    try:
        if file.filesystem is None and file.size > _SMALL:
            with open(file.path, "rb") as stream:  # noqa: PTH123
                zipped = stream.read(4) == b"PK\x03\x04"  # only this format can be mapped
            return torch.load(file.path, map_location="cpu", weights_only=True, mmap=zipped)
        data = io.BytesIO(_read_bytes(file))
        return torch.load(data, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise _not_weights(file, error) from error


def _not_weights(file: CheckpointFile, error: Exception) -> CheckpointError:
    text = str(error).strip()
    refused = _GLOBAL.search(text)
    if refused:
        return CheckpointError(
            f"{file.uri}: a pickle that holds more than weights ({refused.group(1)}); nothing in "
            "it was run. Save the weights alone: torch.save(model.state_dict(), ...), or "
            "safetensors"
        )
    # torch's advice, to load without weights_only, is no advice for untrusted files.
    detail = _UNPICKLER.search(text)
    if isinstance(error, EOFError):
        reason = "it ends too early"
    elif text.startswith("Weights only load failed"):
        reason = detail.group(1) if detail else "its pickle holds something else"
    else:
        first = text.splitlines()[0].partition(". ")[0] if text else ""
        reason = f"{type(error).__name__}: {first}"
    return CheckpointError(
        f"{file.uri}: truncated, or not weights saved by torch.save: {reason[:200]}. Copy it "
        "again, or save the weights alone: torch.save(model.state_dict(), ...)"
    )


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _scalars(items: Iterable[tuple[Any, Any]], *, tensors: bool) -> dict[str, Value]:
    """Numbers, texts and booleans beside the weights, and one level below known keys."""
    found: dict[str, Value] = {}
    for key, value in items:
        if isinstance(value, Mapping) and key in _SETTINGS:
            for name, scalar in _scalars(value.items(), tensors=True).items():
                found.setdefault(name, scalar)
        elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
            continue
        elif isinstance(value, (bool, int, float, str)):
            found[str(key)] = value
        elif tensors and isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
            found[str(key)] = value.item()
    return found
