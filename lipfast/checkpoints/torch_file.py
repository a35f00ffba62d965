"""Read what `torch.save` writes; no code inside is ever run."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import IO, Any

from torch import Tensor

from lipfast.checkpoints.access import read_bytes, require_regular
from lipfast.checkpoints.content import HEAD, foreign
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.file_memory import FileMemory
from lipfast.checkpoints.pickled_tensors import Buffer
from lipfast.checkpoints.safetensors_file import SMALL
from lipfast.checkpoints.stand_ins import (
    MoreThanWeightsError,
    OtherFormatError,
    StandIn,
    UnsafePickleError,
)
from lipfast.checkpoints.torch_container import ZIP, read_container
from lipfast.checkpoints.wrapped import STATE, Content, holds_states, unwrapped
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
    found: list[Content] = []

    def wanted(content: object) -> Iterable[Tensor]:
        found.append(collected(file, content))
        return found[0].tensors.values()

    load_harmless(file, path, size, wanted=wanted)
    return found[0]


def collected(file: CheckpointFile, content: object) -> Content:
    """The weights inside what was loaded.

    Raises:
        NotWeightsError: it is the state of an optimizer or the like.
        CheckpointError: it is no dict.
        UnsafePickleError: it is nested beyond what weights are.
        NamesError: names cannot tell its weights apart.
    """
    found = unwrapped(content, file.size)
    if found.tensors or found.unread:
        return found
    if holds_states(content):
        raise NotWeightsError(
            f"{file.uri}: holds the state of an optimizer, a scheduler or the like, no weights"
        )
    state = next((name for name, kind in found.beside.items() if kind == STATE), None)
    if state is not None:
        raise NotWeightsError(
            f"{file.uri}: its tensors lie below '{printable(state[:200])}', {STATE}: no weights. "
            "Save weights under another key"
        )
    is_object = isinstance(content, StandIn) and content.items_set is None and not content.is_module
    if is_object or not isinstance(content, Mapping):
        kind = content.name if isinstance(content, StandIn) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{file.uri}: holds {printable(kind[:200])}; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it"
        )
    return found


def load_harmless(
    file: CheckpointFile,
    path: str,
    size: int,
    data: bytes | None = None,
    wanted: Callable[[Any], Iterable[object]] | None = None,
) -> Any:
    """Load what `torch.save` wrote, whatever it is; nothing in it is run.

    What is neither a plain value nor a tensor is a `StandIn`.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its parts.
        size: of `path`, as far as it is known.
        data: of a part of a file, which is loaded instead.
        wanted: picks the tensors whose numbers are read, where not all of them are: of large files
            those of others are not there.

    Raises:
        CheckpointError: it is truncated, or no file of torch's.
        UnreachableError: it was written to meanwhile.
        OSError: it cannot be read.
    """
    if data is None and file.filesystem is None and size > SMALL:
        require_regular(file, path)
        with open(path, "rb") as stream:  # noqa: PTH123
            memory = FileMemory(file, stream)
            is_archive = stream.read(len(ZIP)) == ZIP
            stream.seek(0)
            if wanted is None or not is_archive:  # of the older format most is copied anyway
                memory.read_all()
            read = None if wanted is None or not is_archive else memory.read
            content = _loaded(file, stream, memory.buffer, size, read)
            if wanted is not None:
                memory.read_storages(wanted(content))
            memory.require_unchanged()
            return content
    data = read_bytes(file, path) if data is None else data
    content = _loaded(file, io.BytesIO(data), bytearray(data), size, None)
    if wanted is not None:
        wanted(content)
    return content


def _loaded(
    file: CheckpointFile,
    stream: IO[bytes],
    buffer: Buffer,
    size: int,
    read: Callable[[int, int], None] | None,
) -> Any:
    """What a container holds; errors say which file and what to do."""
    try:
        return read_container(stream, buffer, read)
    except (OSError, CheckpointError):
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
        stream.seek(0)
        head = stream.read(HEAD)
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
