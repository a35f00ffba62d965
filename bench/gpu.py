"""The CUDA kernels' timings, each beside the memory and arithmetic limit of the device.

``make bench-gpu``, and a part of ``make gpu-day``. Times are medians of CUDA events around the op;
bytes and operations are the least that the op can do with (docs/cuda.md), so a fraction of the
limit is not that of a profiler. The limits are measured first, on the same device: a copy, and
large products of a library. ``--once`` runs every op once and times nothing, for a profiler.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast import _native
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.ops.jacobian_reduction import jacobian_reduction

REPETITIONS = 20


@dataclass(frozen=True)
class Case:
    """One call, with the least bytes and operations that it needs.

    Attributes:
        name: for the reader.
        call: what is timed.
        bytes: from the device's memory and to it.
        operations: additions and multiplications.
        double: whether these are of float64.
    """

    name: str
    call: Callable[[], object]
    bytes: float
    operations: float
    double: bool = False


def milliseconds(call: Callable[[], object]) -> float:
    """Median over the repetitions, after three to warm up."""
    for _ in range(3):
        call()
    times: list[float] = []
    for _ in range(REPETITIONS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


@dataclass(frozen=True)
class Limits:
    """Bytes and operations per second that the device reached; an addition is an operation."""

    bandwidth: float
    float32: float
    float64: float
    tf32: float

    def of(self, case: Case) -> tuple[float, str]:
        """Least milliseconds of a case, and what they are spent on."""
        memory = 1e3 * case.bytes / self.bandwidth
        arithmetic = 1e3 * case.operations / (self.float64 if case.double else self.float32)
        return max((memory, "memory"), (arithmetic, "arithmetic"))


def limits(side: int = 8192, size: int = 1 << 30) -> Limits:
    """What a copy of a GiB and square products of a library reach here."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    bandwidth = 2e3 * size / milliseconds(lambda: target.copy_(source))
    operations = 2e3 * float(side) ** 3
    single = random(side, side)
    double = single.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        float32 = operations / milliseconds(lambda: single @ single)
        torch.set_float32_matmul_precision("high")
        tf32 = operations / milliseconds(lambda: single @ single)
    finally:
        torch.set_float32_matmul_precision(before)
    return Limits(bandwidth, float32, operations / milliseconds(lambda: double @ double), tf32)


def random(*shape: int) -> Tensor:
    """Normal numbers on the device."""
    return torch.randn(shape, device="cuda")


def spectral(count: int, rows: int, cols: int, passes: int = 40) -> Case:
    """Lanczos with a fixed number of passes."""
    matrices = [random(rows, cols) for _ in range(count)]

    def call() -> object:
        # A tolerance that is never met: every matrix takes all passes.
        return torch.ops.lipfast.spectral_norms(
            matrices, [], False, 1e-300, passes, False, 0, 1 << 30
        )

    size = float(count * rows * cols)
    # What a block holds is read once; the others in every pass, before the first, after the last.
    reads = 1 if cols <= 256 and 4 * rows * cols <= 384 << 10 else passes + 2
    return Case(
        f"spectral_norms {count} x ({rows}, {cols}), {passes} passes",
        call,
        4 * size * reads,
        4 * size * passes,
        double=True,
    )


def reduction(batch: int, outputs: int, inputs: int) -> Case:
    """Gram matrices of given Jacobians."""
    jacobian = random(batch, outputs, inputs)
    side, longer = min(outputs, inputs), max(outputs, inputs)
    return Case(
        f"jacobian_reduction ({batch}, {outputs}, {inputs})",
        lambda: jacobian_reduction(jacobian),
        4.0 * batch * outputs * inputs,
        float(batch) * side * (side + 1) * longer,
        double=True,
    )


def chain(networks: int, batch: int, widths: tuple[int, ...]) -> Case:
    """ReLU networks; half of the units count as inactive."""
    shapes = list(zip(widths[1:], widths[:-1], strict=True))
    weights = [[random(*shape) / shape[1] ** 0.5 for shape in shapes] for _ in range(networks)]
    biases: list[list[Tensor | None]] = [[random(shape[0]) for shape in shapes] for _ in weights]
    x = random(batch, widths[0])
    hidden: list[Stage] = [Linear(), Activation("relu")]
    stages = [*hidden * (len(shapes) - 1), Linear()]
    products = sum(widths[-1] * a * b for b, a in shapes[:-1])  # half of 2 K a b
    forward = sum(2 * a * b for b, a in shapes)
    parameters = 4.0 * networks * sum(a * b for b, a in shapes)
    return Case(
        f"chain_jacobian_norms {networks} networks, batch {batch}, {'-'.join(map(str, widths))}",
        lambda: chain_jacobian_norms(x, weights, biases, stages),
        parameters + 4.0 * networks * batch * (widths[0] + 2),
        float(networks) * batch * (products + forward),
    )


def cases() -> Iterator[Case]:
    """One after the other: each holds its inputs only while it is timed."""
    yield spectral(1000, 256, 256)
    yield spectral(100, 1024, 1024)
    yield spectral(4, 4096, 4096)
    yield reduction(20000, 10, 784)
    yield reduction(2000, 64, 784)
    yield chain(1, 10000, (784, 256, 10))
    yield chain(100, 1000, (40, 256, 256, 10))
    yield chain(1, 4000, (784, 1024, 1024, 10))


def print_timings() -> None:
    """Measure the limits, time the kernels and print a line for each."""
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}")
    found = limits()
    print(
        f"measured: {found.bandwidth / 1e12:.2f} TB/s; TFLOP/s {found.float32 / 1e12:.1f} float32, "
        f"{found.float64 / 1e12:.1f} float64, {found.tf32 / 1e12:.1f} TF32 (products of a library)"
    )
    print(f"{'ms':>9} {'limit ms':>9} {'bound by':>10} {'of limit':>9}")
    for case in cases():
        taken = milliseconds(case.call)
        limit, by = found.of(case)
        print(f"{taken:9.3f} {limit:9.3f} {by:>10} {limit / taken:9.1%}  {case.name}", flush=True)


def main() -> None:
    """``python -m bench.gpu [--once]``."""
    reason = _native.cuda_reason() or _native.no_cuda_device()
    if reason is not None:
        print(f"bench-gpu: skipped: {reason}")
        return
    torch.manual_seed(0)
    if "--once" in sys.argv[1:]:
        for case in cases():
            case.call()
        torch.cuda.synchronize()
    else:
        print_timings()


if __name__ == "__main__":
    main()
