"""How the CUDA build is chosen, and what the report complains about; needs no nvcc."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_report  # noqa: E402
import machine_code  # noqa: E402
import nvcc  # noqa: E402

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void lipfast::cuda::jacobian_reduction_kernel<float>\
(lipfast::JacobianReductionParams, double*)' for 'sm_90'
ptxas info    : Function properties for jacobian_reduction_kernel
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 60 registers, used 1 barriers, 128 bytes smem
"""

SASS = """
	code for sm_90
		Function : void lipfast::cuda::jacobian_reduction_kernel<float>(lipfast::Params, double*)
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   S2R R4, SR_CTAID.X ;                 /* 0x0000000000047919 */
                                                                        /* 0x000e220000002500 */
        /*0010*/                   DFMA R2, R4, R6, R2 ;
        /*0020*/                   LDS.128 R8, [R3+0x10] ;
        /*0030*/                   FFMA R8, R9, R10, R8 ;
        /*0040*/                   FFMA.FTZ R8, R9, R10, R8 ;
        /*0050*/                   FADD R8, R9, R10 ;
        /*0060*/              @!P1 BRA 0x20 ;
        /*0070*/                   LDS R8, [R3] ;
        /*0080*/               @P0 FFMA R8, R9, R10, R8 ;
        /*0090*/               @P2 BRA P3, 0x70 ;
        /*00a0*/                   BRA 0x10 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
"""


def test_the_hot_loop_is_the_one_densest_in_arithmetic() -> None:
    found = machine_code.hot_loops(SASS)
    assert found == {("jacobian_reduction_kernel<float>", "sm_90"): machine_code.Loop(5, 2)}
    straight = machine_code.hot_loop(SASS.replace("BRA", "NOP"))
    assert straight == machine_code.Loop(13, 4)
    assert straight.share == 31


def test_no_cuda_when_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPFAST_CUDA", "0")
    assert nvcc.find_toolkit() is None


def test_cuda_that_is_asked_for_must_be_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("LIPFAST_CUDA", "1")
    with pytest.raises(SystemExit, match=r"(?s)LIPFAST_CUDA=1 asks.*nvcc does not exist"):
        nvcc.find_toolkit()
    monkeypatch.delenv("LIPFAST_CUDA")
    assert nvcc.find_toolkit() is None
    monkeypatch.setenv("LIPFAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 0 or 1, not 'yes'"):
        nvcc.find_toolkit()


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert nvcc.architectures() == ["8.0", "9.0+PTX"]
    assert nvcc.architecture_flags(nvcc.architectures()) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a")
    assert nvcc.architectures() == ["8.6", "9.0a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="got 'Hopper'"):
        nvcc.architectures()


def test_a_spill_is_reported() -> None:
    loops = {("jacobian_reduction_kernel<float>", "sm_90"): machine_code.Loop(10, 5)}
    rows = cuda_report.rows_of(PTXAS, loops)
    assert [(row.registers, row.spilled) for row in rows] == [(60, 28)]
    assert rows[0].shared == 52480 + 128
    before = {(row.kernel, row.architecture): (0, 50) for row in rows}
    found = cuda_report.complaints(rows, before)
    assert len(found) == 1
    assert "spills 28 bytes" in found[0]


def test_a_fall_is_reported() -> None:
    row = cuda_report.Row("kernel", "sm_80", 256, 129, 0, 0)
    assert row.occupancy == 12  # one block of 8 warps: 65536 / (136 * 32) is 15 warps
    assert cuda_report.Row("kernel", "sm_80", 256, 128, 0, 0).occupancy == 25
    assert cuda_report.Row("kernel", "sm_80", 256, 32, 100 << 10, 0).occupancy == 12
    assert cuda_report.complaints([row], {("kernel", "sm_80"): (12, 0)}) == []
    assert cuda_report.complaints([row], {("kernel", "sm_80"): (25, 1)}) == [
        "kernel on sm_80: occupancy 12%, was 25%",
        "kernel on sm_80: fused operations in the hot loop 0%, was 1%",
    ]
    assert "in one table only" in cuda_report.complaints([row], {})[0]


def test_the_committed_table_names_every_kernel_and_has_no_spills() -> None:
    table = cuda_report.committed()
    assert {cuda_report.untyped(kernel) for kernel, _ in table} == set(cuda_report.LAUNCHES)
    named = {kernel.split("<")[0].split(" ")[0] for kernel, _ in table}
    assert {architecture for _, architecture in table} == {"sm_80", "sm_90", "sm_100"}
    kernels = "".join(path.read_text() for path in nvcc.KERNELS.glob("*.cuh"))
    assert all(f"{kernel}(" in kernels for kernel in named)
    assert kernels.count("__global__") == len(named)
    spilled = [line.split()[-5] for line in cuda_report.TABLE.read_text().splitlines()[1:]]
    assert set(spilled) == {"0"}


def test_the_check_of_the_build_says_what_is_missing() -> None:
    ended = subprocess.run(
        [sys.executable, "tests/check_cuda_build.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("CUDA kernel registered" in ended.stdout) == (ended.returncode == 0)
    if ended.returncode != 0:
        assert "built without CUDA" in ended.stderr


def test_warnings_are_errors_on_request_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit = nvcc.Toolkit(Path("nvcc"), tmp_path, "13.0")
    call = (toolkit, Path("a.cu"), Path("a.o"), ["8.0"])
    monkeypatch.delenv("LIPFAST_WERROR", raising=False)
    assert "-Werror" not in nvcc.compile_command(*call)
    monkeypatch.setenv("LIPFAST_WERROR", "1")
    assert "-Werror" in nvcc.compile_command(*call)
