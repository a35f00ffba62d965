"""Read a checkpoint's weights and metadata. Files are untrusted: no code in them is ever run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lipfast.checkpoints.access import names_beside, read_range, require_no_bomb, require_regular
from lipfast.checkpoints.content import HEAD, is_safetensors, is_torch
from lipfast.checkpoints.deepspeed import read_deepspeed, require_one_piece
from lipfast.checkpoints.distributed import read_distributed
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Metadata
from lipfast.checkpoints.names import DISTRIBUTED, MODEL_STATES, SLICES
from lipfast.checkpoints.pattern import customary_path, run_folder
from lipfast.checkpoints.safetensors_file import read_safetensors
from lipfast.checkpoints.sharded import read_sharded
from lipfast.checkpoints.sidecar import sidecar_metadata
from lipfast.checkpoints.stand_ins import UnsafePickleError
from lipfast.checkpoints.torch_file import out_of_proportion, read_torch
from lipfast.checkpoints.wrapped import WRAPPERS, Content, NamesError, below, without_levels
from lipfast.errors import CheckpointError, UnreachableError
from lipfast.text import printable


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        file: where it came from.
        state_dict: parameter name to tensor, on the CPU; names as without `torch.compile` and FSDP.
        metadata: run, step, epoch, hyper-parameters and metrics.
        tensors: all of the file, other networks included, under their full names: the keys on the
            way to a network, then its own, with dots between them.
        note: what was done so that the weights fit an architecture; empty where nothing was.
    """

    file: CheckpointFile
    state_dict: dict[str, Tensor]
    metadata: Metadata
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    note: str = ""


def read_checkpoint(file: CheckpointFile, *, prefix: str | None = None) -> Checkpoint:
    """Read one checkpoint.

    `.safetensors` files go through safetensors, `.pt`, `.pth`, `.ckpt`, `.bin` and other files
    through a reader of pickles that imports and calls nothing: what lies beside the weights may be
    of any class. Of a pickled module the parameters and buffers are read. The weights may lie
    anywhere in larger dicts and lists; of several networks the one below the first of `WRAPPERS`
    is taken, raw weights before averages, a student before its teacher. Shards, and the slices of
    `torch.distributed.checkpoint` and ZeRO-3, are put together. Metadata comes, the first that
    knows a key, from a manifest or a pattern, from the file (the header of a safetensors file, or
    whatever numbers, texts and booleans a `.pt` file holds beside the weights), from JSON files
    beside it, and from names such as `epoch=3-step=100.ckpt`.

    Args:
        file: as `find_checkpoints` lists it.
        prefix: of the names of the network that is taken, such as `ema` or `state_dict.teacher`.

    Returns:
        The checkpoint, on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, or not plain weights; names the file, the
            reason, and what to do. No name has the prefix.
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
        found = _read_by_suffix(file)
        beside = sidecar_metadata(file)
        tensors, unread = without_levels(found.tensors), without_levels(found.unread)
        (taken,) = without_levels({found.taken: None})
    except (UnsafePickleError, NamesError) as error:
        raise out_of_proportion(file, error) from error
    except FileNotFoundError as error:
        raise UnreachableError(f"{file.uri}: no such file: it was moved or deleted") from error
    except OSError as error:
        reason = error.strerror or f"{type(error).__name__}: {error}"
        raise UnreachableError(f"{file.uri}: cannot be read: {reason}") from error
    if not tensors and not unread:
        raise CheckpointError(
            f"{file.uri}: holds no tensors; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it, or one under keys such as "
            f"{', '.join(repr(key) for key in WRAPPERS[:3])}"
        )
    named = customary_path(file.path)
    known = {**named, **beside, **found.raw, **file.extra}
    if prefix is not None:
        taken = _chosen(file, {**tensors, **unread}, prefix)
    for name, kind in unread.items():
        if name.startswith(taken):
            raise CheckpointError(
                f"{file.uri}: '{printable(name[:200])}' is {printable(kind[:200])}, which lipfast "
                "does not read. Save plain tensors (.dequantize(), .to_dense(), .full_tensor()), "
                "or the weights of the model before it was converted"
            )
    own = {name.removeprefix(taken): one for name, one in tensors.items() if name.startswith(taken)}
    metadata = Metadata(known, run_folder(file.folder))
    return Checkpoint(file, own, metadata, tensors)


def _chosen(file: CheckpointFile, names: Mapping[str, object], prefix: str) -> str:
    found = below(names, prefix) if prefix.strip(".") else [""]
    if not found:
        shown = ", ".join(repr(name[:200]) for name in list(names)[:3])
        raise CheckpointError(f"{file.uri}: no name begins with '{prefix}.'; there are {shown} ...")
    return found[0]


def _read_by_suffix(file: CheckpointFile) -> Content:
    require_regular(file, file.path)
    require_no_bomb(file)
    if file.size == 0 and file.filesystem is None:
        raise CheckpointError(
            f"{file.uri}: truncated, or not yet written: it is empty. Copy or save it again"
        )
    if file.distributed:
        return read_distributed(file)
    if file.sharded:
        return read_sharded(file)
    name = file.path.rpartition("/")[2]
    if name.endswith(SLICES):
        raise CheckpointError(
            f"{file.uri}: the index '{DISTRIBUTED}' of its folder is missing. Copy the whole folder"
        )
    if file.path.rpartition("/")[0].rpartition("/")[2].startswith("mp_rank_"):  # Megatron
        require_one_piece(file, names_beside(file, 2))
    return _read_by_content(file)


def _read_by_content(file: CheckpointFile) -> Content:
    """Read it as its name says, or as its content does."""
    named_safe = file.suffix == ".safetensors"
    try:
        if file.path.endswith(MODEL_STATES):
            return read_deepspeed(file)
        return _read_sorted(file) if named_safe else read_torch(file, file.path, file.size)
    except CheckpointError:
        head = read_range(file, file.path, 0, HEAD)
        if not (is_torch(head) if named_safe else is_safetensors(head)):
            raise
        return read_torch(file, file.path, file.size) if named_safe else _read_sorted(file)


def _read_sorted(file: CheckpointFile) -> Content:
    tensors, raw = read_safetensors(file, file.path, file.size)
    # safetensors gives entries in an order that differs from one reading to the next
    return Content(dict(sorted(tensors.items())), raw)
