"""The native extension: loading it, and what it says about itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType

from lipfast._version import __version__
from lipfast.errors import ArgumentError, NativeError

try:
    # torch first: the extension links against its libraries.
    import torch

    from lipfast import _C
except ImportError as error:
    raise NativeError(
        f"the native extension lipfast._C could not be loaded ({error}). Build it with "
        "'make build' or 'pip install --no-build-isolation -e .'; it needs a C++ compiler and "
        "torch >= 2.10"
    ) from error


def _require_version(extension: str, built_for: str) -> None:
    if built_for != __version__:
        raise NativeError(
            f"the {extension} extension was built for lipfast {built_for}, the Python part is "
            f"{__version__}: build again with 'make build'"
        )


_require_version("native", _C.build_info()["version"])


def _not_bound(extension: ModuleType) -> str | None:
    """Why the CUDA kernels cannot work with this torch, or None; a CPU torch never calls them."""
    if torch.version.cuda is None or extension.bound_to_torch():
        return None
    return (
        f"the CUDA library of torch {torch.__version__} was not found, or lacks what "
        "lipfast._C_cuda calls; use torch >= 2.10, and import it before lipfast's extensions"
    )


# Beside it, if it was built: the CUDA kernels. Without them everything else works.
_cuda_info: dict[str, str] | None = None
_cuda_reason: str | None = None
try:
    from lipfast import _C_cuda
except ImportError as error:
    built = importlib.util.find_spec("lipfast._C_cuda") is not None
    _cuda_reason = (
        f"lipfast._C_cuda could not be loaded ({error})"
        if built
        else "built without CUDA; build again where nvcc is (LIPFAST_CUDA=1 insists)"
    )
else:
    _require_version("CUDA", _C_cuda.build_info()["version"])
    _cuda_reason = _not_bound(_C_cuda)
    _cuda_info = None if _cuda_reason else _C_cuda.build_info()


def devices() -> tuple[str, ...]:
    """Types of the devices that this build has kernels for."""
    return ("cpu",) if _cuda_info is None else ("cpu", "cuda")


def cuda_info() -> dict[str, str] | None:
    """nvcc, architectures, torch and package version of the CUDA build, if there is one."""
    return None if _cuda_info is None else dict(_cuda_info)


def cuda_reason() -> str | None:
    """Why there are no CUDA kernels, or None."""
    return _cuda_reason


def no_cuda_device() -> str | None:
    """Why nothing can run on CUDA here, whatever was built; None where there is a device."""
    if torch.version.cuda is None:
        return f"no CUDA device: torch {torch.__version__} was built without CUDA"
    if torch.cuda.is_available():
        return None
    reasons = []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        reasons.append(f": CUDA_VISIBLE_DEVICES is {visible!r}")
    # Only torch's own start knows of a missing driver, or of one that is too old.
    with suppress(AssertionError):
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            reasons.append(f": {str(error).strip().splitlines()[0]}")
    return "no CUDA device" + "".join(reasons)


def capability() -> str:
    """Name of the CPU instruction set whose kernels run: `default`, `avx2` or `avx512`.

    Chosen from the processor; the environment variable `LIPFAST_CPU_CAPABILITY` overrides it.

    Raises:
        ArgumentError: if the environment names a set that this processor does not run.
    """
    try:
        return _C.capability()
    except RuntimeError as error:
        raise ArgumentError(str(error)) from error


def available_capabilities() -> list[str]:
    """Names of the instruction sets that this processor runs, worst first."""
    return _C.available_capabilities()


@contextmanager
def forced_capability(name: str) -> Iterator[None]:
    """Runs a block with the kernels of one instruction set; process-wide, meant for tests.

    Raises:
        ArgumentError: if this processor does not run it.
    """
    before = capability()
    try:
        _C.set_capability(name)
    except ValueError as error:
        raise ArgumentError(str(error)) from error
    try:
        yield
    finally:
        _C.set_capability(before)


def interrupt_of(error: RuntimeError) -> BaseException | None:
    """What a signal's handler raised while the op worked that ended with this error, once."""
    return _C.take_interrupt() if _C.INTERRUPTED in str(error) else None


def watch(call: Callable[[float], None] | None) -> None:
    """Has long ops of this thread call something with the share of their work that is done."""
    _C.watch(call)


def build_info() -> dict[str, str]:
    """Compiler, torch version and package version of the build."""
    return _C.build_info()
