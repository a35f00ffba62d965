"""Builds lipfast._C and, where nvcc is, lipfast._C_cuda; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT / "csrc"))

from nvcc import architectures, compile_kernels, find_toolkit  # noqa: E402

COMPILE_FLAGS = [
    "-O3",
    "-std=c++20",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unused-parameter",  # torch's own headers
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]

MISSING_COMPILER = """
lipfast has a native part and no C++ compiler was found (looked for: {compiler}).
Install one and run the same command again:
  Debian, Ubuntu   apt-get install g++ python3-dev
  Fedora           dnf install gcc-c++ python3-devel
  macOS            xcode-select --install
or set the environment variable CXX to the compiler's path.
"""
MISSING_TORCH = """
lipfast is built against PyTorch, and torch cannot be imported here: {error}
Run 'make build' (makes a virtual environment with the pinned torch), or install torch first
and use 'pip install --no-build-isolation .'.
"""


def package_version() -> str:
    """The version in lipfast/_version.py, without importing the package."""
    scope: dict[str, str] = {}
    exec((ROOT / "lipfast" / "_version.py").read_text(), scope)
    return scope["__version__"]


def find_compiler() -> str:
    """The C++ compiler that torch's build will call; exits with advice when there is none."""
    compiler = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
    if shutil.which(compiler.split()[0]) is None:
        sys.exit(MISSING_COMPILER.format(compiler=compiler))
    os.environ.setdefault("CXX", compiler)
    return compiler


def extension_arguments() -> dict[str, object]:
    """ext_modules and cmdclass for `setup`."""
    try:
        import torch
        from pybind11 import get_include
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(MISSING_TORCH.format(error=error))
    compiler = find_compiler()
    described = subprocess.run(
        [*compiler.split(), "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    macros = [
        # LibTorch's stable ABI: one build serves torch 2.10 and later.
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ("LIPFAST_COMPILER", f'"{described}"'),
        ("LIPFAST_TORCH_VERSION", f'"{torch.__version__}"'),
        ("LIPFAST_VERSION", f'"{package_version()}"'),
    ]
    sources = sorted(
        str(path.relative_to(ROOT))
        for folder in ("csrc", "csrc/ops", "csrc/ops/cpu", "csrc/kernels/cpu")
        for path in (ROOT / folder).glob("*.cpp")
    )
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
    extension = CppExtension(
        "lipfast._C",
        sources,
        include_dirs=[get_include()],
        define_macros=macros,
        depends=headers,
        extra_compile_args=COMPILE_FLAGS,
    )
    toolkit = find_toolkit()
    if toolkit is None:
        return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}

    # torch's own CUDAExtension refuses a CPU torch; the stable ABI needs no other.
    checks = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops").glob("*.cpp"))
    launches = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops/cuda").glob("*.cpp")
    )
    cuda_macros = [
        ("LIPFAST_CHECKS_ONLY", "1"),
        ("USE_CUDA", "1"),
        ("LIPFAST_NVCC", f'"nvcc {toolkit.version}"'),
        ("LIPFAST_ARCHITECTURES", f'"{" ".join(architectures())}"'),
    ]
    cuda = CppExtension(
        "lipfast._C_cuda",
        [*checks, *launches],
        include_dirs=[get_include(), str(toolkit.include)],
        define_macros=[*macros, *cuda_macros],
        depends=headers,
        library_dirs=[str(toolkit.libraries)],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args=COMPILE_FLAGS,
    )

    class BuildWithKernels(BuildExtension):
        """Compiles the .cu files with nvcc before the C++ that calls them."""

        def build_extension(self, ext):
            before = self.build_temp
            if ext is cuda:
                # A folder of its own: the checks are compiled twice, with different macros.
                self.build_temp = str(Path(before) / "cuda")
                Path(self.build_temp).mkdir(parents=True, exist_ok=True)
                ext.extra_objects = compile_kernels(toolkit, Path(self.build_temp) / "kernels")
            super().build_extension(ext)
            self.build_temp = before

    return {"ext_modules": [extension, cuda], "cmdclass": {"build_ext": BuildWithKernels}}


# LIPFAST_BUILD=0: 'setup.py build_ext --inplace' has been run, which compiles only what changed; an
# editable installation alone would compile everything each time.
setup(**({} if os.environ.get("LIPFAST_BUILD") == "0" else extension_arguments()))
