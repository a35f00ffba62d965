"""Registers, shared memory, spills, occupancy and arithmetic share of every CUDA kernel.

``python csrc/cuda_report.py`` compiles the kernels for sm_80, sm_90 and sm_100, prints the table
and fails where a kernel spills, or has a lower theoretical occupancy or a smaller share of fused
operations in its hot loop than the committed table (csrc/cuda_report.txt) says; ``--write``
rewrites that table.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from machine_code import Loop, find_cuobjdump, hot_loops, listing
from nvcc import ROOT, Toolkit, compile_command, find_toolkit, sources

TABLE = ROOT / "csrc" / "cuda_report.txt"
ARCHITECTURES = ("8.0", "9.0", "10.0")
HEADINGS = (
    "kernel",
    "arch",
    "threads",
    "registers",
    "shared",
    "spilled",
    "blocks/SM",
    "occupancy",
    "hot loop",
    "fused",
)

# Per architecture: registers, shared bytes, warps and blocks of a multiprocessor; shared bytes that
# each block takes beside its own (CUDA C++ Programming Guide, table of compute capabilities).
REGISTERS = 65536
SHARED = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
WARPS = 64
BLOCKS = 32
RESERVED_SHARED = 1024

NO_LOOP = Loop(0, 0)

# Threads and dynamic shared memory (bytes) with which the launchers start a kernel, by its name
# without the type: for Jacobians of K = 64 rows, for the chain in float32.
LAUNCHES = {
    "jacobian_reduction_kernel": [(256, 8 * (32 + 4 * 64 + 64 * 33 + 64 * 65), "K=64")],
    **{
        f"jacobian_reduction_warp_kernel<{width}>": [(128, 8 * 128 // lanes * 16 * (width + 2), "")]
        for width, lanes in ((4, 4), (10, 16), (16, 16), (32, 32))
    },
    "spectral_norms_kernel": [(256, 38352, "")],
    "spectral_resident_kernel": [(128, 80 << 10, "KB=64"), (256, 160 << 10, "KB=384")],
    "spectral_table_kernel": [(64, 0, "")],
    "secant_lines_kernel": [(256, 320, "")],
    "secant_quotients_kernel": [(256, 22960, "")],
    "stack_kernel": [(256, 0, "")],
    "hermitian_residual_kernel": [(256, 8 * (32 + 2 * 2 * 32 * 17), "")],
    "symbol_grams_kernel": [(256, 8 * (2 * 64 + 3 * 32 * 33), "")],
    "tap_products_kernel<2>": [(256, 8 * 2 * 32 * 18, "")],
    "tap_products_kernel<4>": [(256, 8 * 2 * 64 * 18, "")],
    "shifted_grams_kernel": [(256, 8 * 2 * 32 * 18, "")],
    "residual_parts_kernel": [(256, 8 * (32 + 2 * 32 * 18), "")],
    "cholesky_bounds_kernel": [(128, 256, "")],
    **{
        f"chain_jacobian_norms_kernel<{rows}, {dense}>": [(384, shared + more, "")]
        for rows, shared in ((4, 92640), (8, 104928), (10, 117216))
        for dense, more in (("false", 0), ("true", 8192))
    },
}


@dataclass(frozen=True)
class Row:
    """One kernel, launched in one way, on one architecture."""

    kernel: str
    architecture: str
    threads: int
    registers: int
    shared: int
    spilled: int
    loop: Loop = NO_LOOP

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        warps = -(-self.threads // 32)
        # Registers are given to warps in units of 256, shared memory to blocks in units of 128.
        per_warp = -(-self.registers * 32 // 256) * 256
        shared = -(-(self.shared + RESERVED_SHARED) // 128) * 128
        by_registers = REGISTERS // per_warp // 4 * 4 // warps  # four schedulers with a part each
        return min(BLOCKS, WARPS // warps, by_registers, SHARED[self.architecture] // shared)

    @property
    def occupancy(self) -> int:
        """Percent of the warps that a multiprocessor can hold."""
        return round(100 * self.blocks * -(-self.threads // 32) / WARPS)

    def cells(self) -> tuple[str, ...]:
        """As the table shows it."""
        numbers = (self.threads, self.registers, self.shared, self.spilled, self.blocks)
        loop = (str(self.loop.instructions), f"{self.loop.share}%")
        return (self.kernel, self.architecture, *map(str, numbers), f"{self.occupancy}%", *loop)


def compiler_output(toolkit: Toolkit, cuobjdump: str, source: Path) -> tuple[str, str]:
    """What ptxas says about the kernels of a source, and their machine code; names readable."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.o"
        command = compile_command(toolkit, source, target, list(ARCHITECTURES))
        ended = subprocess.run(
            [*command, "-Xptxas", "-v"], capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            sys.exit(f"nvcc failed on {source.name}:\n{ended.stdout}{ended.stderr}")
        code = listing(cuobjdump, target)
    shown = subprocess.run(
        ["c++filt"], input=ended.stdout + ended.stderr, capture_output=True, text=True, check=True
    )
    return shown.stdout, code


def untyped(kernel: str) -> str:
    """`kernel<10>` for `kernel<float, 10> K=3`."""
    name = re.sub(r" \w+=\d+$", "", kernel)
    return re.sub(r"<(?:float|double)(?:, )?", "<", name).removesuffix("<>")


def rows_of(text: str, loops: Mapping[tuple[str, str], Loop]) -> list[Row]:
    """The table's rows from the output of ptxas -v, with the kernels' hot loops."""
    pattern = re.compile(
        r"Compiling entry function '(?:void )?lipfast::cuda::(?P<kernel>\w+(?:<[^>]*>)?)\(.*?\)' "
        r"for '(?P<arch>sm_\d+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill "
        r"loads.*?Used (?P<registers>\d+) registers[^\n]*",
        re.DOTALL,
    )
    rows = []
    for found in pattern.finditer(text):
        # What is said of the functions that the kernel calls follows.
        all_said = found[0] + text[found.end() :].split("Compiling entry function", 1)[0]
        static = re.search(r"(\d+) bytes smem", found[0])
        for threads, dynamic, case in LAUNCHES[untyped(found["kernel"])]:
            rows.append(
                Row(
                    kernel=f"{found['kernel']}{' ' if case else ''}{case}",
                    architecture=found["arch"],
                    threads=threads,
                    registers=int(found["registers"]),
                    shared=dynamic + (int(static[1]) if static else 0),
                    spilled=sum(int(size) for size in re.findall(r"(\d+) bytes spill", all_said)),
                    loop=loops[found["kernel"], found["arch"]],
                )
            )
    return rows


def report(toolkit: Toolkit) -> list[Row]:
    """Every kernel on every architecture."""
    cuobjdump = find_cuobjdump(toolkit.nvcc)
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        texts = list(pool.map(partial(compiler_output, toolkit, cuobjdump), sources()))
    rows = [row for text, code in texts for row in rows_of(text, hot_loops(code))]
    missing = set(LAUNCHES) - {untyped(row.kernel) for row in rows}
    if missing:
        sys.exit(f"the compiler said nothing about {', '.join(sorted(missing))}")
    return sorted(rows, key=lambda row: (row.kernel, row.architecture))


def table(rows: list[Row]) -> str:
    """Aligned columns."""
    lines = [HEADINGS, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        + "\n"
        for line in lines
    )


def committed() -> dict[tuple[str, str], tuple[int, int]]:
    """Occupancy and share of fused operations by kernel and architecture, as committed."""
    entries = [re.split(r"\s{2,}", line) for line in TABLE.read_text().splitlines()[1:]]
    return {
        (entry[0], entry[1]): (int(entry[-3].rstrip("%")), int(entry[-1].rstrip("%")))
        for entry in entries
    }


def complaints(rows: list[Row], before: dict[tuple[str, str], tuple[int, int]]) -> list[str]:
    """Spills, falls in occupancy or arithmetic, and kernels that only one of the tables has."""
    now = {(row.kernel, row.architecture): (row.occupancy, row.loop.share) for row in rows}
    spills = [
        f"{row.kernel} on {row.architecture} spills {row.spilled} bytes"
        for row in rows
        if row.spilled
    ]
    falls = [
        f"{kernel} on {architecture}: {what} {value}%, was {old}%"
        for (kernel, architecture), old_values in before.items()
        for what, value, old in zip(
            ("occupancy", "fused operations in the hot loop"),
            now.get((kernel, architecture), old_values),
            old_values,
            strict=True,
        )
        if value < old
    ]
    strangers = sorted(set(now) ^ set(before))
    renamed = [
        f"{kernel} on {architecture} is in one table only" for kernel, architecture in strangers
    ]
    return spills + falls + renamed


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the committed table")
    write = parser.parse_args().write
    toolkit = find_toolkit()
    if toolkit is None:
        sys.exit("no CUDA toolkit: put nvcc on the path or set CUDA_HOME")
    rows = report(toolkit)
    print(table(rows), end="")
    if write:
        TABLE.write_text(table(rows))
    found = complaints(rows, committed())
    if found:
        sys.exit("\n".join([*found, "if that is meant: python csrc/cuda_report.py --write"]))


if __name__ == "__main__":
    main()
