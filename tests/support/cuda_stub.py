"""A CUDA device without a GPU: all of lipfast's host code for CUDA, on a CPU torch.

``python -m pytest -p tests.support.cuda_stub tests/gpu`` runs the tests of the device on it. It is
two libraries: ``_C_cuda``, whose launchers and ops are compiled against a stub of the CUDA runtime
that runs kernels as fibers, and ``libtorch_cuda.so``, which gives a CPU torch the devices cuda:0
and cuda:1. Both replace what is there for a whole process, so that it has to be one of its own;
torch looks for its devices once, so that it must not be imported before.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.harness import COMMON, HERE, KERNELS, ROOT, compiler

OPS = ROOT / "csrc" / "ops"
# Warnings are left to the other builds of the same sources; torch's headers have their own.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi", "-Wno-unknown-pragmas"]
MACROS = {
    "TORCH_TARGET_VERSION": "0x020a000000000000",
    "TORCH_EXTENSION_NAME": "_C_cuda",
    "LIPFAST_CHECKS_ONLY": "1",
    "USE_CUDA": "1",
    "LIPFAST_NVCC": '"no nvcc: a stub"',
    "LIPFAST_ARCHITECTURES": '"stub"',
}


def folder_of(package: str) -> Path:
    """Where a package is installed, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def sources() -> dict[str, list[Path]]:
    """What is compiled together, by the name of the object: torch's headers are read once."""
    launchers = {path.stem: [path] for path in sorted((KERNELS / "cuda").glob("*.cu"))}
    return {**launchers, "ops": [*sorted(OPS.glob("*.cpp")), *sorted((OPS / "cuda").glob("*.cpp"))]}


def fingerprint() -> str:
    """Of everything that the libraries are compiled from."""
    digest = hashlib.sha256(repr((FLAGS, COMMON, MACROS, compiler(), sys.version)).encode())
    digest.update(importlib.metadata.version("torch").encode())
    for folder in (ROOT / "csrc", HERE):
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def call(*command: object) -> None:
    """Run the compiler."""
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def build() -> Path:
    """The folder with both libraries; they stay until a source changes."""
    folder = ROOT / "build" / "cuda_stub" / fingerprint()
    if (folder / "_C_cuda.so").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch, compile_with = folder_of("torch"), [compiler() or "c++", *FLAGS]
    version: dict[str, str] = {}
    exec((ROOT / "lipfast" / "_version.py").read_text(), version)
    macros = {
        **MACROS,
        "LIPFAST_VERSION": f'"{version["__version__"]}"',
        "LIPFAST_TORCH_VERSION": f'"{importlib.metadata.version("torch")}"',
    }
    includes = [
        torch / "include",
        folder_of("pybind11") / "include",
        sysconfig.get_paths()["include"],
    ]
    for_torch = [*(f"-D{name}={value}" for name, value in macros.items())]
    for_torch += [f"-I{path}" for path in includes]
    for_kernels = ["-DLIPFAST_CUDA_ON_CPU", f"-I{HERE / 'stub_runtime'}", f"-I{HERE}", *COMMON]
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    objects = {name: folder / f"{name}-{os.getpid()}.o" for name in sources()}

    def compile_object(name: str) -> None:
        together = folder / f"{name}-{os.getpid()}.cpp"
        together.write_text("".join(f'#include "{path}"\n' for path in sources()[name]))
        given = for_torch if name == "ops" else for_kernels
        call(*compile_with, *given, "-c", together, "-o", objects[name])
        together.unlink()

    def link(name: str, *given: object) -> None:
        part = folder / f"{name}.{os.getpid()}"
        call(*compile_with, "-shared", *given, *links, f"-Wl,-soname,{name}", "-o", part)
        part.rename(folder / name)

    with ThreadPoolExecutor() as pool:
        device = pool.submit(
            link, "libtorch_cuda.so", f"-I{torch / 'include'}", HERE / "torch_cuda_on_cpu.cpp"
        )
        list(pool.map(compile_object, objects))
        device.result()
    link("_C_cuda.so", *objects.values(), "-ldl")
    for path in objects.values():
        path.unlink()
    return folder


def load(folder: Path) -> None:
    """Give torch the devices, and lipfast its kernels for them."""
    assert "torch" not in sys.modules, "torch looks for its devices when it is imported"
    ctypes.CDLL(str(folder / "libtorch_cuda.so"), mode=ctypes.RTLD_GLOBAL)
    import torch  # noqa: PLC0415 - after its CUDA library

    def clone(storage: Any) -> Any:
        held = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return held.set_(storage, 0, (storage.nbytes(),), (1,)).clone().untyped_storage()

    # What a CPU build of torch leaves out, or refuses in Python.
    torch.UntypedStorage.clone = clone  # type: ignore[assignment,method-assign]
    torch.version.cuda = "13.0"
    torch.cuda._lazy_init = lambda: None
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 2
    torch.cuda.current_device = lambda: 0
    torch.cuda.synchronize = lambda device=None: None
    torch.Tensor.pin_memory = lambda self, device=None: self.clone()  # type: ignore[method-assign]
    # Everything is done when it is queued.
    over = SimpleNamespace(query=lambda: True)
    torch.cuda.current_stream = lambda device=None: SimpleNamespace(record_event=lambda: over)  # type: ignore[assignment,return-value]
    spec = importlib.util.spec_from_file_location("lipfast._C_cuda", folder / "_C_cuda.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["lipfast._C_cuda"] = module


def loaded() -> bool:
    """Whether the device of this process is the stub."""
    module = sys.modules.get("lipfast._C_cuda")
    return module is not None and "stub" in module.build_info()["nvcc"]


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Given to pytest with -p: the device is there before a conftest imports torch."""
    load(build())
