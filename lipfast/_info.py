"""What is installed, what was built and what runs."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass

import torch

from lipfast import _native
from lipfast._version import __version__


@dataclass(frozen=True)
class Info:
    """Versions, CPU capability, threads, devices and build, as `info()` found them."""

    lipfast: str
    torch: str
    python: str
    capability: str
    available_capabilities: tuple[str, ...]
    threads: int
    compiler: str
    built_with_torch: str
    devices: tuple[str, ...]
    cuda: str

    def to_dict(self) -> dict[str, object]:
        """The same as a dictionary of plain values."""
        return asdict(self)

    def __getitem__(self, key: str) -> object:
        return self.to_dict()[key]

    def __str__(self) -> str:
        values = {
            "lipfast": self.lipfast,
            "torch": f"{self.torch} (built with {self.built_with_torch})",
            "python": self.python,
            "capability": f"{self.capability} (of {', '.join(self.available_capabilities)})",
            "threads": self.threads,
            "devices": ", ".join(self.devices),
            "compiler": self.compiler,
            "cuda": self.cuda,
        }
        return "\n".join(f"{key:<11} {value}" for key, value in values.items())


def info() -> Info:
    """Versions, CPU capability, threads, and what was built.

    Returns:
        An `Info`; `str(info())` is a table, `info()["capability"]` one value.

    Example:
        >>> import lipfast
        >>> lipfast.info()["capability"] in ("default", "avx2", "avx512")
        True
    """
    build, cuda = _native.build_info(), _native.cuda_info()
    return Info(
        lipfast=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        capability=_native.capability(),
        available_capabilities=tuple(_native.available_capabilities()),
        threads=torch.get_num_threads(),
        compiler=build["compiler"],
        built_with_torch=build["torch"],
        devices=_native.devices(),
        cuda=str(_native.cuda_reason())
        if cuda is None
        else f"{cuda['nvcc']}, {cuda['architectures']}",
    )
