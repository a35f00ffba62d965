"""The errors that lipfast raises: all derive from `LipfastError`.

Each says what was wrong, where (file, parameter, entry of the list) and what to do next.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence


class LipfastError(Exception):
    """Base class of every error that lipfast raises on purpose."""


class ArgumentError(LipfastError, ValueError):
    """An argument has the wrong value, type, shape, dtype or device."""


class NonFiniteError(LipfastError, ValueError):
    """A weight or a sample is NaN or infinite; the message names which."""


class TraceError(LipfastError):
    """`torch.export` could not trace the model into a graph."""


@contextlib.contextmanager
def naming(op: str, module: str, within: str = "") -> Iterator[None]:
    """Errors inside that are not lipfast's own become a `TraceError` that names an operation.

    Args:
        op: the ATen op.
        module: path of the module that it came from.
        within: what failed, where that is known.
    """
    try:
        yield
    except (LipfastError, MemoryError):
        raise
    except Exception as error:
        if "allocate" in str(error) or "out of memory" in str(error):
            raise
        lines = str(error).strip().splitlines()
        first = f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
        raised = f"{first}, in {within}" if within else first
        raise TraceError(
            f"{op} in module '{module or '(root)'}' cannot be bounded as it is used here ({raised})"
        ) from error


class UnsupportedOpError(LipfastError, NotImplementedError):
    """The model holds ops without a rule: all of them are listed.

    Attributes:
        ops: pairs (ATen op, module path), one per offending node.
    """

    def __init__(self, ops: Sequence[tuple[str, str]], hint: str = "") -> None:
        self.ops = list(ops)
        times = Counter(self.ops)
        where = "; ".join(
            f"{op} in module '{module or '(root)'}'" + (f" ({count} times)" if count > 1 else "")
            for (op, module), count in times.items()
        )
        message = f"no rule for {where}"
        super().__init__(f"{message}. {hint}" if hint else message)


class StateDictError(LipfastError, ValueError):
    """A state dict does not match the architecture; names the parameter and both shapes."""


class CheckpointError(LipfastError):
    """A checkpoint file is missing, truncated, or is not plain weights."""


class NotWeightsError(CheckpointError):
    """A file holds what trainers keep beside the weights, such as the state of an optimizer."""


class UnreachableError(CheckpointError):
    """A checkpoint cannot be reached now: it is missing, forbidden, or the network is down."""


class ArchiveError(LipfastError):
    """An archive is missing or holds no checkpoints."""


class StoreError(LipfastError):
    """A store of scores cannot be written or read, or has an unknown schema version."""


class CertificateError(LipfastError, ValueError):
    """A certificate is malformed, or does not prove a bound of the network at hand; says why."""


class NativeError(LipfastError, ImportError):
    """The native extension is missing or does not match this installation."""


class MissingPackageError(LipfastError, ImportError):
    """An optional package is not installed; says how to install it."""
