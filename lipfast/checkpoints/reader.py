"""Read a checkpoint's weights and metadata. Files are untrusted: no code in them is ever run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from torch import Tensor

from lipfast.checkpoints.access import read_head, require_no_bomb, require_regular
from lipfast.checkpoints.content import HEAD, foreign, is_safetensors, is_torch
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Metadata, Scalar
from lipfast.checkpoints.pattern import customary, customary_folder, run_folder
from lipfast.checkpoints.safetensors_file import read_safetensors
from lipfast.checkpoints.sharded import read_sharded
from lipfast.checkpoints.sidecar import sidecar_metadata
from lipfast.checkpoints.stand_ins import MoreThanWeightsError, UnsafePickleError
from lipfast.checkpoints.torch_file import WRAPPERS, out_of_proportion, read_torch
from lipfast.errors import CheckpointError, UnreachableError

_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")  # at the start, or after a dot


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

    `.safetensors` files go through safetensors, `.pt`, `.pth`, `.ckpt`, `.bin` and other files
    through a reader of pickles that imports and calls nothing: what lies beside the weights may be
    of any class. Of a pickled module the parameters and buffers are read. The weights may lie in a
    larger dict under one of `WRAPPERS`. Metadata comes, the first that knows a key, from a
    manifest or a pattern, from the file (the header of a safetensors file, or whatever numbers,
    texts and booleans a `.pt` file holds beside the weights), from JSON files beside it, and from
    names such as `epoch=3-step=100.ckpt`.

    Args:
        file: as `find_checkpoints` lists it.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or not plain weights; names the file, the
            reason, and what to do.
        UnreachableError: the same, where another try may succeed.

    Example:
        >>> import pathlib, tempfile, torch
        >>> from safetensors.torch import save_file
        >>> from lipfast.checkpoints import find_checkpoints
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "step7.safetensors"
        >>> save_file({"weight": torch.eye(2)}, path, metadata={"step": "7"})
        >>> checkpoint = read_checkpoint(find_checkpoints(path)[0])
        >>> list(checkpoint.state_dict), checkpoint.metadata.step
        (['weight'], 7)
    """
    try:
        tensors, raw = _read_by_suffix(file)
        beside = sidecar_metadata(file)
    except UnsafePickleError as error:
        raise out_of_proportion(file, error) from error
    except FileNotFoundError as error:
        raise UnreachableError(f"{file.uri}: no such file: it was moved or deleted") from error
    except OSError as error:
        reason = error.strerror or f"{type(error).__name__}: {error}"
        raise UnreachableError(f"{file.uri}: cannot be read: {reason}") from error
    if not tensors:
        raise CheckpointError(
            f"{file.uri}: holds no tensors; expected a state dict, as "
            f"torch.save(model.state_dict(), ...) writes it, or one under "
            f"{', '.join(repr(key) for key in WRAPPERS)}"
        )
    path = PurePosixPath(file.path)
    named = {**customary_folder(path.parent.name), **customary(path.stem)}
    known = {**named, **beside, **raw, **file.extra}
    return Checkpoint(file, without_compiled(tensors), Metadata(known, run_folder(file.folder)))


def _read_by_suffix(file: CheckpointFile) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    require_regular(file, file.path)
    require_no_bomb(file)
    if file.size == 0 and file.filesystem is None:
        raise CheckpointError(
            f"{file.uri}: truncated, or not yet written: it is empty. Copy or save it again"
        )
    if file.sharded:
        return read_sharded(file)
    readers = [read_torch, read_safetensors]
    if file.suffix == ".safetensors":
        readers.reverse()
    try:
        return readers[0](file, file.path, file.size)
    except CheckpointError as error:
        head = read_head(file, HEAD)
        if is_safetensors(head) if readers[0] is read_torch else is_torch(head):
            return readers[1](file, file.path, file.size)  # the other kind, misnamed
        told = isinstance(error.__cause__, (UnsafePickleError, MoreThanWeightsError))
        what = None if told else foreign(head, file.size)
        if what is None:
            raise
        raise CheckpointError(f"{file.uri}: {what}") from error


def without_compiled(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the level that `torch.compile` adds to parameter names, wherever it is.

    The prefix `module.` of `DataParallel` stays: a model may well have a child of that name, so
    only a plan can tell, and does.

    Example:
        >>> import torch
        >>> list(without_compiled({"_orig_mod.encoder._orig_mod.weight": torch.zeros(1)}))
        ['encoder.weight']
    """
    return {_COMPILED.sub("", name): tensor for name, tensor in state_dict.items()}
