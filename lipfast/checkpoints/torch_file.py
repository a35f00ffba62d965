"""Read what `torch.save` writes; no code inside is ever run."""

from __future__ import annotations

import io
import mmap
import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lipfast.checkpoints.access import read_bytes
from lipfast.checkpoints.file import CheckpointFile
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.safetensors_file import SMALL
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.stand_ins import (
    MoreThanWeightsError,
    OtherFormatError,
    StandIn,
    UnsafePickleError,
)
from lipfast.checkpoints.torch_container import read_container
from lipfast.errors import CheckpointError
from lipfast.text import printable

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "network", "net", "weights")
"""Keys under which training scripts keep the weights inside a larger dict, perhaps nested."""

_MAX_DEPTH = 4
_MAX_PACKED = 64


def read_torch(
    file: CheckpointFile, path: str, size: int
) -> tuple[dict[str, Tensor], dict[str, Scalar]]:
    """Read the weights, and the scalars beside them as metadata.

    Args:
        file: the checkpoint, for messages and access.
        path: the file itself, or one of its shards.
        size: of `path`, as far as it is known.

    Raises:
        CheckpointError: it is truncated, or holds something else than weights.
        OSError: it cannot be read.
    """
    content = load_harmless(file, path, size)
    is_object = isinstance(content, StandIn) and content.items_set is None and not content.is_module
    if is_object or not isinstance(content, Mapping):
        kind = content.name if isinstance(content, StandIn) else f"a {type(content).__name__}"
        raise CheckpointError(
            f"{file.uri}: holds {printable(kind[:200])}; expected a state dict, as "
            "torch.save(model.state_dict(), ...) writes it"
        )
    raw: dict[str, Scalar] = {}
    weights = content
    for _ in range(_MAX_DEPTH):
        inner = next((weights[key] for key in WRAPPERS if _is_dict(weights.get(key))), None)
        raw = {**scalars(weights.items(), tensors=inner is not None), **raw}
        if inner is None:
            break
        weights = inner
    require_tensors(file, weights)
    tensors = {
        name: value.detach()
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    return tensors, raw


def _is_dict(value: object) -> bool:
    """Whether a value may hold the weights: a dict with tensors or with dicts in it."""
    return isinstance(value, Mapping) and any(
        isinstance(entry, (Tensor, Mapping)) for entry in value.values()
    )


def require_tensors(file: CheckpointFile, weights: Mapping[Any, Any]) -> None:
    """Refuse weights some of which are tensors of a kind that is not read.

    Raises:
        CheckpointError: says which, and of what kind.
    """
    for name, value in weights.items():
        parts = value if isinstance(value, tuple) else (value,)  # packed parameters are tuples
        for part in parts[:_MAX_PACKED]:
            if isinstance(part, StandIn) and part.is_tensor:
                raise CheckpointError(
                    f"{file.uri}: '{printable(str(name)[:200])}' is {printable(part.name[:200])}, "
                    "which lipfast does not read. Save plain tensors (.dequantize(), .to_dense(), "
                    ".full_tensor()), or the weights of the model before it was converted"
                )


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
        raise _no_weights(file, error) from error


def out_of_proportion(file: CheckpointFile, error: Exception) -> CheckpointError:
    """The error of a file whose content would take memory or time out of proportion."""
    return CheckpointError(
        f"{file.uri}: {error}; nothing in it was loaded. Save the weights alone: "
        "torch.save(model.state_dict(), ...), or safetensors"
    )


def _no_weights(file: CheckpointFile, error: Exception) -> CheckpointError:
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
