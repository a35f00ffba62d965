"""How nvcc compiles the CUDA kernels: which compiler, which architectures, which flags.

`setup.py` builds with it and `cuda_report.py` reports on the same compilation.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

MISSING_NVCC = """
LIPFAST_CUDA=1 asks for the CUDA kernels, and nvcc was not found: {reason}.
Put nvcc on the path or set CUDA_HOME to the toolkit's folder, or leave LIPFAST_CUDA unset to build
for the CPU alone.
"""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that can compile and link."""

    nvcc: Path
    libraries: Path  # the folder of libcudart_static.a
    version: str

    @property
    def include(self) -> Path:
        """The folder of cuda_runtime.h."""
        return self.libraries.parent / "include"


def find_toolkit() -> Toolkit | None:
    """The toolkit to build with, or None where none is wanted or found.

    LIPFAST_CUDA=0 builds without, =1 exits where there is none.
    """
    wanted = os.environ.get("LIPFAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"LIPFAST_CUDA must be 0 or 1, not '{wanted}'")
    if wanted == "0":
        return None
    toolkit = _search()
    if isinstance(toolkit, str):
        if wanted == "1":
            sys.exit(MISSING_NVCC.format(reason=toolkit))
        return None
    return toolkit


def _search() -> Toolkit | str:
    home = os.environ.get("CUDA_HOME")
    found = str(Path(home) / "bin" / "nvcc") if home else shutil.which("nvcc")
    if found is None or not Path(found).is_file():
        return f"{found} does not exist" if found else "it is not on the path"
    shown = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release ([\d.]+)", shown.stdout)
    if version is None:
        return f"{found} --version does not say its release"
    places = _toolkit_folders(found)
    for place in places:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if (place / folder / "libcudart_static.a").is_file():
                return Toolkit(Path(found), place / folder, version[1])
    return f"{found} is there, but libcudart_static.a is not in {', '.join(map(str, places))}"


def _toolkit_folders(nvcc: str) -> list[Path]:
    """Where the toolkit of an nvcc may lie; asked of nvcc itself, which may be a wrapper."""
    places = [Path(nvcc).resolve().parent.parent]
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    if top is not None:
        places.insert(0, Path(top[1]).resolve())
    return places


def architectures() -> list[str]:
    """Compute capabilities as TORCH_CUDA_ARCH_LIST gives them, such as 8.0 and 9.0+PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    found = listed.replace(";", " ").split()
    for entry in found:
        if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", entry):
            sys.exit(
                f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0 or 9.0+PTX, got '{entry}'"
            )
    return found


def architecture_flags(entries: list[str]) -> list[str]:
    """The options of nvcc for compute capabilities."""
    flags = []
    for entry in entries:
        number = entry.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number},compute_{number}" if entry.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code=[{code}]")
    return flags


def sources() -> list[Path]:
    """The launchers, with the kernels that they include."""
    return sorted(KERNELS.glob("*.cu"))


def compile_command(toolkit: Toolkit, source: Path, target: Path, entries: list[str]) -> list[str]:
    """The call of nvcc for one source."""
    # Errors where the project is checked only: a user's compiler may know other warnings. Never is
    # one what the host compiler says about nvcc's own output.
    strict = ["-Werror", "all-warnings"] if os.environ.get("LIPFAST_WERROR") == "1" else []
    return [
        *[str(toolkit.nvcc), *FLAGS, *strict, *architecture_flags(entries)],
        *["-c", str(source), "-o", str(target)],
    ]


def compile_kernels(toolkit: Toolkit, folder: Path) -> list[str]:
    """Compile all launchers, several at a time; those that are up to date stay. Returns objects."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*(ROOT / "csrc" / "kernels").rglob("*.h"), *KERNELS.glob("*.cuh"), Path(__file__)]
    entries = architectures()
    newest = max(path.stat().st_mtime for path in headers)

    def build(source: Path) -> str:
        target = folder / f"{source.stem}-{'-'.join(entries)}.o"
        changed = max(newest, source.stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < changed:
            command = compile_command(toolkit, source, target, entries)
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            if ended.returncode != 0:
                target.unlink(missing_ok=True)
                raise RuntimeError(f"nvcc failed on {source.name}:\n{ended.stdout}{ended.stderr}")
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(build, sources()))
