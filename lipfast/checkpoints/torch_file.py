"""Read what `torch.save` writes, with `weights_only=True`: no code inside is ever run."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch

from lipfast.checkpoints import pickle_guard
from lipfast.checkpoints.access import read_bytes
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.safetensors_file import SMALL
from lipfast.checkpoints.wrapped import Content, TooManyValuesError, holds_states, unwrapped
from lipfast.errors import CheckpointError, NotWeightsError

_GLOBAL = re.compile(r"\bGLOBAL ([\w.]+)")
_UNPICKLER = re.compile(r"WeightsUnpickler error:\s*([^\n]+)")


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
        CheckpointError: it is no dict, or nested beyond what weights are.
    """
    try:
        found = unwrapped(content)
    except TooManyValuesError as error:
        raise CheckpointError(
            f"{file.uri}: nested beyond what weights are; nothing was taken. Save the weights "
            "alone: torch.save(model.state_dict(), ...), or safetensors"
        ) from error
    if not found.tensors and holds_states(content):
        raise NotWeightsError(
            f"{file.uri}: holds the state of an optimizer, a scheduler or the like, no weights"
        )
    if not found.tensors and not isinstance(content, Mapping):
        raise CheckpointError(
            f"{file.uri}: holds a {type(content).__name__}; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it"
        )
    return found


def load_harmless(file: CheckpointFile, path: str, size: int, data: bytes | None = None) -> Any:
    """Load what `torch.save` wrote, whatever it is; nothing in it is run.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its parts.
        size: of `path`, as far as it is known.
        data: of a part of a file, which is loaded instead.

    Raises:
        CheckpointError: it is truncated, or holds what is not loaded.
        OSError: it cannot be read.
    """
    try:
        if data is None and file.filesystem is None and size > SMALL:
            with open(path, "rb") as stream:  # noqa: PTH123
                pickle_guard.require_harmless(stream, size)
                stream.seek(0)
                start = stream.read(len(pickle_guard.ZIP))
            mapped = start == pickle_guard.ZIP  # only this format can be
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        data = read_bytes(file, path) if data is None else data
        pickle_guard.require_harmless(io.BytesIO(data), len(data))
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle_guard.UnsafePickleError as error:
        raise CheckpointError(
            f"{file.uri}: {error}; nothing in it was loaded. Save the weights alone: "
            "torch.save(model.state_dict(), ...), or safetensors"
        ) from error
    except pickle_guard.PlainPickleError as error:
        raise _more_than_weights(file, str(error)) from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise _refused(file, error) from error


def _more_than_weights(file: CheckpointFile, what: str) -> CheckpointError:
    return CheckpointError(
        f"{file.uri}: a pickle that holds more than weights ({what[:200]}); nothing in it was run. "
        "Save the weights alone: torch.save(model.state_dict(), ...), or safetensors"
    )


def _refused(file: CheckpointFile, error: Exception) -> CheckpointError:
    text = str(error).strip()
    refused = _GLOBAL.search(text)
    if refused:
        return _more_than_weights(file, refused.group(1))
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
