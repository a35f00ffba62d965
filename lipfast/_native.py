"""The native extension: loading it, and what it says about itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lipfast._version import __version__
from lipfast.errors import ArgumentError, NativeError

try:
    # torch first: the extension links against its libraries.
    import torch  # noqa: F401

    from lipfast import _C
except ImportError as error:
    raise NativeError(
        f"the native extension lipfast._C could not be loaded ({error}). Build it with "
        "'make build' or 'pip install --no-build-isolation -e .'; it needs a C++ compiler and "
        "torch >= 2.10"
    ) from error

if _C.build_info()["version"] != __version__:
    raise NativeError(
        f"the native extension was built for lipfast {_C.build_info()['version']}, the Python part "
        f"is {__version__}: build again with 'make build'"
    )


def capability() -> str:
    """Name of the CPU instruction set whose kernels run: `default`, `avx2` or `avx512`.

    Chosen from the processor; the environment variable `LIPFAST_CPU_CAPABILITY` overrides it.

    Raises:
        ArgumentError: if the environment names a set that this processor does not run.
    """
    try:
        name: str = _C.capability()
    except RuntimeError as error:
        raise ArgumentError(str(error)) from error
    return name


def available_capabilities() -> list[str]:
    """Names of the instruction sets that this processor runs, worst first."""
    names: list[str] = _C.available_capabilities()
    return names


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


def build_info() -> dict[str, str]:
    """Compiler, torch version and package version of the build."""
    info: dict[str, str] = _C.build_info()
    return info
