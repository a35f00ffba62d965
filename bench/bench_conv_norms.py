"""Convolutions: the certified bracket (gap 1e-3), the lower value at the true size, and others.

The FFT-and-SVD of half of the frequencies (the others are conjugates) of a 32 x 32 input is the
norm for circular padding and no bound for zero padding; power iterations prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import pytest
import torch
from torch import Tensor

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.ops._conv_bracket import Budget
from lipfast.ops._conv_brackets import lower_at_true_size, symbol_brackets
from lipfast.ops._conv_operator import conv_operator

INPUT_SIZE = 32
LIPFAST, FFT = "lipfast", "FFT and SVD, half of 32 x 32"
SVD = "SVD of half of 32 x 32"
BOTH = "lipfast, both sides at this size"
POWER = "naive (100 power iterations)"
families = pytest.mark.parametrize("family", ["gaussian", "low-pass"])


@pytest.fixture(scope="module", autouse=True)
def forget_kernels() -> Iterator[None]:
    """The kernels of a case do not outlive the module."""
    yield
    for function in (kernel, symbols):
        function.cache_clear()


@cache
def kernel(channels: int, family: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels, 3, 3, generator=generator)
    return weight.abs() if family == "low-pass" else weight


def supremum(weight: Tensor) -> lipfast.ConvNorms[Tensor]:
    """The certified bracket over all sizes; what a 1 x 1 input adds is negligible."""
    return lipfast.conv_norms(weight, input_sizes=1, padding=1)


@in_turn(LIPFAST, FFT)
@families
def bench_supremum_64(benchmark: Benchmark, family: str, turn: int, implementation: str) -> None:
    weight = kernel(64, family)
    bracket = supremum(weight).supremum
    assert float(bracket.upper[0] - bracket.lower[0]) <= 1e-3 * float(bracket.upper[0])
    work: Implementations = {
        LIPFAST: (lambda: supremum(weight), 1),
        FFT: (lambda: baselines.fft_conv_norm(weight, INPUT_SIZE), 1),
    }
    case = f"sup over sizes, 3 x 3, 64 to 64, {family}"
    measure(benchmark, case, implementation, work[implementation])


FREQUENCIES, ALL = 8, INPUT_SIZE * (INPUT_SIZE // 2 + 1)


@cache
def symbols(channels: int, family: str) -> Tensor:
    """The symbol at the first few frequencies of one axis."""
    taps = kernel(channels, family).permute(2, 3, 0, 1).flatten(0, 1)
    steps = torch.arange(3).repeat(3)
    waves = [torch.exp(-2j * torch.pi * steps * p / INPUT_SIZE) for p in range(FREQUENCIES)]
    return torch.stack([torch.einsum("k,knm->nm", wave, taps + 0j) for wave in waves])


@in_turn(LIPFAST, SVD, turns=3)
@families
def bench_supremum_512(benchmark: Benchmark, family: str, turn: int, implementation: str) -> None:
    """Time per frequency: the baseline takes 8 of 544, without the FFT; lipfast does all of it."""
    weight, few = kernel(512, family), symbols(512, family)
    work: Implementations = {
        LIPFAST: (lambda: supremum(weight), ALL),
        SVD: (lambda: torch.linalg.svdvals(few).max(), FREQUENCIES),
    }
    case = f"sup over sizes, 3 x 3, 512 to 512, {family}, per frequency"
    measure(benchmark, case, implementation, work[implementation], warmup=False)


def lower_alone(channels: int, family: str) -> Callable[[], object]:
    """Lower value at the default tolerance, from the supremum's frequency and vector."""
    weight = kernel(channels, family)
    conv = conv_operator(
        weight,
        "kernel",
        input_size=INPUT_SIZE,
        stride=1,
        padding=1,
        dilation=1,
        groups=1,
        padding_mode="zeros",
        transposed=False,
        output_padding=0,
    )
    budget = Budget(1e-3, 0, 300, 100_000, 1 << 30)
    (symbol,) = symbol_brackets([conv], [None], budget)
    return lambda: lower_at_true_size(conv, symbol, None, budget)


@in_turn(LIPFAST, BOTH, POWER, turns=3)
@pytest.mark.parametrize("channels", [64, 256])
@families
def bench_true_size(
    benchmark: Benchmark, family: str, channels: int, turn: int, implementation: str
) -> None:
    """The certified lower value at 32 x 32 with zero padding."""
    weight = kernel(channels, family)
    work: Implementations = {
        LIPFAST: (lower_alone(channels, family), 1),
        BOTH: (lambda: lipfast.conv_norms(weight, input_sizes=INPUT_SIZE, padding=1), 1),
        POWER: (lambda: baselines.naive_conv_norm(weight, INPUT_SIZE), 1),
    }
    case = f"lower at 32 x 32, 3 x 3, {channels} to {channels}, {family}"
    measure(benchmark, case, implementation, work[implementation])
