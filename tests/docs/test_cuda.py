"""What docs/cuda.md quotes: launches, the compiler's report, constants of the kernels, steps."""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lipfast
from bench.gpu_day import MINUTES, MOST, MOST_OF_A_LOG, steps
from lipfast.ops.emulation import products_are_ieee
from lipfast.plan.stacked import StackedStateDicts
from tests.support.pretended_device import (
    CUDA,
    NATIVE_ON_CUDA,
    on_device,
    pretended_device,
)

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "csrc"))

import cuda_report  # noqa: E402
import nvcc  # noqa: E402

PAGE = " ".join((ROOT / "docs" / "cuda.md").read_text().split())
HEADERS = "".join(path.read_text() for path in nvcc.KERNELS.glob("*.*h"))


def numbers(pattern: str) -> list[int]:
    """The numbers in the one place of the page that a pattern describes."""
    found = re.findall(pattern, PAGE)
    assert len(found) == 1, (pattern, found)
    groups = found[0] if isinstance(found[0], tuple) else found
    return [int(group.replace(",", "")) for group in groups]


def test_launches_and_waits() -> None:
    upper, sums, lower = numbers(
        r"Of 1,000 stacked state dicts of 40-256-256-10, `plan.upper` takes (\d+) launches in norm "
        r"2 and (\d+) in norms 1 and inf, and `plan.lower` takes (\d+) in norm 2\."
    )
    torch.manual_seed(0)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise((40, 256, 256, 10))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2]).eval()
    plan, x = lipfast.compile(model, torch.randn(2, 40)), torch.randn(3, 40)
    networks = StackedStateDicts(
        {
            key: on_device(value.expand(1000, *value.shape).clone())
            for key, value in model.state_dict().items()
        }
    )
    calls = {
        upper: lambda: plan.upper(networks),
        sums: lambda: plan.upper(networks, norm=math.inf),
        lower: lambda: plan.lower(networks, on_device(x)),
    }
    for launches, call in calls.items():
        with pretended_device() as counts:
            products_are_ieee(CUDA)  # the first look at how a device multiplies
            counts.clear()
            call()
            assert (counts.launches, counts.syncs) == (launches, 1)


def test_the_table_names_every_native_op() -> None:
    text = (ROOT / "docs" / "cuda.md").read_text()
    table = text.split("| op | on CUDA |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE))
    assert named - {"conv_norms"} == {re.sub("_(points|quotients)$", "", o) for o in NATIVE_ON_CUDA}


CONSTANTS = [
    (r"or per (\d+) others", ["kChunkEntries"]),
    (r"up to (\d+) linear layers with any of the chain's", ["kMaxChainLayers"]),
    (r"activations after them, (\d+) in all", ["kMaxChainActivations"]),
    (
        r"up to (\d+) linear layers and (\d+) piecewise",
        ["kMaxSecantLayers", "kMaxSecantActivations"],
    ),
    (r"Jacobians with a side of up to (\d+) \|", ["kMaxSecantSide"]),
    (r"one launch per ([\d,]+) \|", ["kMaxStacked"]),
    (r"and (\d+) columns is one block's, of (\d+)", ["kResidentColumns", "kSmallResidentThreads"]),
    (r"at most (\d+) such parts", ["kResidentSlots"]),
    (r"add partial sums, (\d+) columns each", ["kSumColumns"]),
    (r"against up to 64 or (\d+) vectors", ["kMaxBasis"]),
    (r"A block has up to (\d+) warps", ["kMaxChainWarps"]),
    (r"A block of (\d+) threads has a network", ["kSecantThreads"]),
    (r"\*Quotients\*: values at (\d+) points", ["kSecantPoints"]),
    (r"pass through shared memory, (\d+) inputs at a time, converted", ["kEnclosedDepth"]),
    (r"Phases are computed (\d+) at a time", ["kSymbolPhases"]),
]


@pytest.mark.parametrize(("pattern", "names"), CONSTANTS, ids=lambda value: str(value)[:20])
def test_constants_are_those_of_the_kernels(pattern: str, names: list[str]) -> None:
    values = [
        int(re.findall(rf"\bconstexpr (?:int|int64_t|unsigned) {name} = (\d+);", HEADERS)[0])
        for name in names
    ]
    assert numbers(pattern) == values


def test_quoted_loops_are_those_of_the_report() -> None:
    lines = cuda_report.TABLE.read_text().splitlines()[1:]
    rows = {tuple(row[:2]): row[2:] for row in (re.split(r"\s{2,}", line) for line in lines)}

    def cells(kernel: str) -> tuple[int, int, int]:
        """Registers, instructions of the hot loop, and the share of them that is fused."""
        row = rows[kernel, "sm_90"]
        return int(row[1]), int(row[-2]), int(row[-1].rstrip("%"))

    for pattern, kernel in (
        (r"(\d+) of (\d+) instructions in the hot loop", "hermitian_residual_kernel"),
        (r"with (\d+) of (\d+) instructions fused", "secant_quotients_kernel<float>"),
    ):
        fused, instructions = numbers(pattern)
        assert cells(kernel)[1:] == (instructions, round(100 * fused / instructions))
    (registers,) = numbers(r"\(8 warps on a multiprocessor, (\d+) registers each")
    assert cells("spectral_resident_kernel KB=384")[0] == registers
    (forward,) = numbers(r"Forward, 12 warps for 24 samples, (\d+) \+ 100 per 16 inputs")
    assert cells("chain_jacobian_norms_kernel<float, 10, false>")[1] == forward
    (dense,) = numbers(r"counts the loops for narrow tiles beside it, (\d+) %\)")
    assert cells("chain_jacobian_norms_kernel<float, 10, true>")[2] == dense
    assert all(int(row[3]) == 0 for row in rows.values()) and "There are no spills." in PAGE


def test_what_is_built_by_default() -> None:
    assert f"by default `{nvcc.DEFAULT_ARCHITECTURES}`" in PAGE


def test_steps_of_the_first_run(tmp_path: Path) -> None:
    table = (ROOT / "docs" / "cuda.md").read_text().split("| step | at most |")[1]
    listed: list[tuple[str, float]] = []
    for names, limits in re.findall(r"^\| (`[^|]*`) \| ([\d, ]+) s \|", table, flags=re.MULTILINE):
        own = re.findall("`([^`]+)`", names)
        listed += zip(own, map(float, limits.split(",")), strict=True)
    assert listed == [(step.name, step.seconds) for step in steps(tmp_path)]
    assert f"takes {MINUTES} minutes at most" in PAGE
    assert f"at most {MOST >> 20} MiB" in PAGE and f"beyond {MOST_OF_A_LOG >> 20} MiB" in PAGE
