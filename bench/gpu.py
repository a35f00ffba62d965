"""The CUDA kernels' timings, each beside the memory and arithmetic limit of the device.

``make bench-gpu``. Times are medians of CUDA events around the op; bytes and operations are the
least that the op can do with (docs/cuda.md), so a fraction of the limit is not that of a profiler.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast import _native
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.ops.jacobian_reduction import jacobian_reduction

# Bytes and float32 operations per second, without tensor cores (NVIDIA's data sheets).
LIMITS = {
    "H200": (4.8e12, 67e12),
    "H100": (3.35e12, 67e12),
    "A100": (2.04e12, 19.5e12),
}
REPETITIONS = 20


@dataclass(frozen=True)
class Case:
    """One call, with the least bytes and operations that it needs."""

    name: str
    call: Callable[[], object]
    bytes: float
    operations: float


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
    return Case(
        f"spectral_norms {count} x ({rows}, {cols}), {passes} passes",
        call,
        4 * size * (passes + 3),
        4 * size * passes,
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


def print_timings() -> None:
    """Time the kernels and print a line for each."""
    reason = _native.cuda_reason() or _native.no_cuda_device()
    if reason is not None:
        print(f"bench-gpu: skipped: {reason}")
        return
    name = torch.cuda.get_device_name()
    known = next((limits for key, limits in LIMITS.items() if key in name), None)
    if known is None:
        sys.exit(f"{name}: add its bandwidth and its float32 rate to LIMITS in bench/gpu.py")
    bandwidth, rate = known
    print(f"{name}: {bandwidth / 1e12:g} TB/s, {rate / 1e12:g} TFLOP/s; torch {torch.__version__}")
    print(f"{'ms':>9} {'limit ms':>9} {'bound by':>10} {'of limit':>9}")
    torch.manual_seed(0)
    cases = [
        spectral(1000, 256, 256),
        spectral(100, 1024, 1024),
        spectral(4, 4096, 4096),
        reduction(20000, 10, 784),
        reduction(2000, 64, 784),
        chain(1, 10000, (784, 256, 10)),
        chain(100, 1000, (40, 256, 256, 10)),
        chain(1, 4000, (784, 1024, 1024, 10)),
    ]
    for case in cases:
        taken = milliseconds(case.call)
        memory, arithmetic = 1e3 * case.bytes / bandwidth, 1e3 * case.operations / rate
        limit = max(memory, arithmetic)
        by = "memory" if memory >= arithmetic else "arithmetic"
        print(f"{taken:9.3f} {limit:9.3f} {by:>10} {limit / taken:9.1%}  {case.name}")


if __name__ == "__main__":
    print_timings()
