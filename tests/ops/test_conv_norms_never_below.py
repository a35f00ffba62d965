"""lower <= truth <= upper with no tolerance: the truth is exact everywhere in this file."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lipfast
from lipfast import _native
from tests.support.conv_cases import Case, draw, together
from tests.support.exact_norms import holds_exactly

RTOLS = (1e-3, 1e-6, 0.5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def exactly(case: Case) -> bool:
    """Whether the explicit matrix holds the taps without rounding: sums of small integers do."""
    zeros = case.options.get("padding_mode", "zeros") == "zeros"
    return zeros or bool((case.kernel == case.kernel.round()).all())


def check(cases: list[Case], **options: Any) -> None:
    cases = [case for case in cases if exactly(case)]
    if not cases:
        return
    norms = lipfast.conv_norms(
        [case.kernel for case in cases], **together(cases), **{"max_cells": 3000, **options}
    )
    for case, lower, upper in zip(cases, norms.lower.tolist(), norms.upper.tolist(), strict=True):
        assert holds_exactly(case.matrix, lower, upper), (case.kernel, case.options)


def test_generated_in_integers(capability: str) -> None:
    """Matrices of up to 14 rows and columns, definiteness decided in integer arithmetic."""
    generator = torch.Generator().manual_seed(1)
    check([draw(generator, largest=14) for _ in range(60)])
    check([draw(generator, largest=10) for _ in range(20)], rtol=1e-6)


def nonnegative(axes: int, generator: torch.Generator) -> torch.Tensor:
    size = torch.randint(2, 5, (axes,), generator=generator).tolist()
    return torch.randint(0, 1000, (1, 1, *size), generator=generator).float()


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_positive_taps_of_one_channel(axes: int, capability: str) -> None:
    """The symbol of positive taps is largest at zero, where it is their sum: an integer."""
    generator = torch.Generator().manual_seed(axes)
    for kernel in [nonnegative(axes, generator) for _ in range(6)]:
        total = Fraction(int(kernel.sum()))
        for rtol in RTOLS if axes < 3 else RTOLS[::2]:
            norms = lipfast.conv_norms(kernel, input_sizes=5, rtol=rtol, max_cells=3000)
            lower, upper = norms.supremum.lower.item(), norms.supremum.upper.item()
            assert Fraction(lower) <= total <= Fraction(upper)


def test_circulant_with_positive_taps(capability: str) -> None:
    """Rows and columns of one sum: the norm at the true size is that integer."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(10):
        kernel = torch.randint(0, 1000, (1, 1, 3, 3), generator=generator).float()
        norms = lipfast.conv_norms(
            kernel, input_sizes=(5, 4), padding=1, padding_mode="circular", rtol=1e-5
        )
        total = Fraction(int(kernel.sum()))
        assert Fraction(norms.lower.item()) <= total <= Fraction(norms.upper.item())


def test_shifts_have_norm_one(capability: str) -> None:
    """Symbols of modulus one everywhere, several groups, any stride up to the kernel."""
    for groups in (1, 3):
        kernel = torch.zeros(groups, 1, 3, 3)
        kernel[:, 0, 2, 0] = 1.0
        for dilation in (1, 2):
            norms = lipfast.conv_norms(
                kernel, input_sizes=(7, 7), groups=groups, dilation=dilation, padding=2
            )
            assert norms.supremum.lower.item() <= 1.0 <= norms.supremum.upper.item()
            assert norms.lower.item() <= 1.0 <= norms.upper.item()


@settings(max_examples=15)
@given(seed=st.integers(0, 2**31), rtol=st.sampled_from(RTOLS))
def test_generated(seed: int, rtol: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    check([draw(generator, largest=10) for _ in range(4)], rtol=rtol)


@pytest.mark.long
@pytest.mark.parametrize("name", _native.available_capabilities())
@settings(max_examples=300)
@given(seed=st.integers(0, 2**31), rtol=st.sampled_from(RTOLS))
def test_campaign(name: str, seed: int, rtol: float) -> None:
    """6,000 convolutions for each instruction set."""
    generator = torch.Generator().manual_seed(seed)
    with _native.forced_capability(name):
        check([draw(generator, largest=12) for _ in range(20)], rtol=rtol)
