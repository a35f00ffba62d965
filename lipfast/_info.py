"""What is installed, what was built and what runs."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass

import torch

from lipfast import _native
from lipfast._version import __version__


@dataclass(frozen=True)
class Info:
    """Versions, CPU capability, threads, kernels and devices, as `info()` found them.

    `kernels`: the types of devices that kernels were built for, `cuda`: how those for CUDA were
    built, or why there are none. `devices`: what is there to run on, `no_cuda_device`: why no CUDA
    device is among them, or None.
    """

    lipfast: str
    torch: str
    python: str
    capability: str
    available_capabilities: tuple[str, ...]
    threads: int
    compiler: str
    built_with_torch: str
    kernels: tuple[str, ...]
    cuda: str
    devices: tuple[str, ...]
    no_cuda_device: str | None

    def to_dict(self) -> dict[str, object]:
        """All fields as a dictionary of plain values."""
        return asdict(self)

    def __getitem__(self, key: str) -> object:
        return self.to_dict()[key]

    def __str__(self) -> str:
        missing = f" ({self.no_cuda_device})" if self.no_cuda_device else ""
        values = {
            "lipfast": self.lipfast,
            "torch": f"{self.torch} (built with {self.built_with_torch})",
            "python": self.python,
            "capability": f"{self.capability} (of {', '.join(self.available_capabilities)})",
            "threads": self.threads,
            "devices": ", ".join(self.devices) + missing,
            "compiler": self.compiler,
            "kernels": ", ".join(self.kernels),
            "cuda": self.cuda,
        }
        return "\n".join(f"{key:<11} {value}" for key, value in values.items())


def info() -> Info:
    """Versions, CPU capability, threads, what was built and what there is to run on.

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
        kernels=_native.devices(),
        cuda=str(_native.cuda_reason())
        if cuda is None
        else f"{cuda['nvcc']}, {cuda['architectures']}",
        devices=("cpu", *_cuda_devices()),
        no_cuda_device=_native.no_cuda_device(),
    )


def _cuda_devices() -> list[str]:
    count = torch.cuda.device_count() if _native.no_cuda_device() is None else 0
    return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
