"""Read what `torch.save` writes; no code inside is ever run."""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Mapping
from typing import Any

from lipfast.checkpoints.access import read_bytes, read_range
from lipfast.checkpoints.content import HEAD, foreign
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.safetensors_file import SMALL
from lipfast.checkpoints.stand_ins import (
    MoreThanWeightsError,
    OtherFormatError,
    StandIn,
    UnsafePickleError,
)
from lipfast.checkpoints.torch_container import read_container
from lipfast.checkpoints.wrapped import Content, holds_states, unwrapped
from lipfast.errors import CheckpointError, NotWeightsError
from lipfast.text import printable


def read_torch(file: CheckpointFile, path: str, size: int) -> Content:
    """Read the weights, and the scalars beside them as metadata.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its shards.
        size: of `path`, as far as it is known.

    Raises:
        CheckpointError: it is truncated, or holds something else than weights.
        OSError: it cannot be read.
    """
    return collected(file, load_harmless(file, path, size))


def collected(file: CheckpointFile, content: object) -> Content:
    """The weights inside what was loaded.

    Raises:
        NotWeightsError: it is the state of an optimizer or the like.
        CheckpointError: it is no dict.
        UnsafePickleError: it is nested beyond what weights are.
        NamesError: names cannot tell its weights apart.
    """
    found = unwrapped(content)
    if found.tensors or found.unread:
        return found
    if holds_states(content):
        raise NotWeightsError(
            f"{file.uri}: holds the state of an optimizer, a scheduler or the like, no weights"
        )
    is_object = isinstance(content, StandIn) and content.items_set is None and not content.is_module
    if is_object or not isinstance(content, Mapping):
        kind = content.name if isinstance(content, StandIn) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{file.uri}: holds {printable(kind[:200])}; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it"
        )
    return found


def load_harmless(file: CheckpointFile, path: str, size: int, data: bytes | None = None) -> Any:
    """Load what `torch.save` wrote, whatever it is; nothing in it is run.

    What is neither a plain value nor a tensor is a `StandIn`.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its parts.
        size: of `path`, as far as it is known.
        data: of a part of a file, which is loaded instead.

    Raises:
        CheckpointError: it is truncated, or no file of torch's.
        OSError: it cannot be read.
    """
    try:
        if data is None and file.filesystem is None and size > SMALL:
            with open(path, "rb") as stream:  # noqa: PTH123
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                return read_container(stream, mapped)
        data = read_bytes(file, path) if data is None else data
        return read_container(io.BytesIO(data), bytearray(data))
    except OSError:
        raise
    except OtherFormatError as error:
        raise CheckpointError(f"{file.uri}: {error}") from error
    except UnsafePickleError as error:
        raise out_of_proportion(file, error) from error
    except MoreThanWeightsError as error:
        raise CheckpointError(
            f"{file.uri}: a pickle that holds more than weights ({printable(str(error)[:200])}); "
            "nothing in it was run. Save the weights alone: torch.save(model.state_dict(), ...), "
            "or safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any way
        head = read_range(file, path, 0, HEAD) if data is None else data[:HEAD]
        raise _no_weights(file, error, foreign(head, size)) from error


def out_of_proportion(file: CheckpointFile, error: Exception) -> CheckpointError:
    """The error of a file whose content would take memory or time out of proportion."""
    return CheckpointError(
        f"{file.uri}: {error}; nothing in it was loaded. Save the weights alone: "
        "torch.save(model.state_dict(), ...), or safetensors"
    )


def _no_weights(file: CheckpointFile, error: Exception, what: str | None) -> CheckpointError:
    if what is not None:
        return CheckpointError(f"{file.uri}: {what}")
    lines = str(error).strip().splitlines() or [""]
    reason = printable(f"{type(error).__name__}: {lines[0]}"[:200])
    if isinstance(error, zipfile.BadZipFile):
        reason = "it begins as such files do, but its end is missing or damaged"
    elif isinstance(error, EOFError):
        reason = "it ends too early"
    return CheckpointError(
        f"{file.uri}: truncated, or not weights saved by torch.save: {reason}. Copy it "
        "again, or save the weights alone: torch.save(model.state_dict(), ...)"
    )
