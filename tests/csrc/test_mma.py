"""The shim's tensor core: the PTX ISA's layout (mma.m16n8k8, .tf32), and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.harness import Harness

LANES = np.arange(32)
GROUP, MEMBER = LANES[:, None] >> 2, LANES[:, None] % 4
REGISTERS = np.arange(4)[None]
# Row and column of every register of every lane, as the ISA's tables have them.
A_ROW, A_COLUMN = GROUP + 8 * (REGISTERS % 2), MEMBER + 4 * (REGISTERS // 2)
B_ROW, B_COLUMN = MEMBER + 4 * REGISTERS[:, :2], GROUP + 0 * REGISTERS[:, :2]
C_ROW, C_COLUMN = GROUP + 8 * (REGISTERS // 2), 2 * MEMBER + REGISTERS % 2


def multiply(harness: Harness, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """What a warp makes of matrices (16, 8), (8, 8) and (16, 8)."""
    inputs = [
        a.astype(np.float32)[A_ROW, A_COLUMN].view(np.uint32),
        b.astype(np.float32)[B_ROW, B_COLUMN].view(np.uint32),
        c.astype(np.float32)[C_ROW, C_COLUMN],
    ]
    (registers,) = harness.run("mma", inputs).take((np.float32, 128))
    result = np.full((16, 8), np.nan)
    result[C_ROW, C_COLUMN] = registers.reshape(32, 4)
    return result


def test_every_entry_is_where_the_isa_has_it(plain: Harness) -> None:
    random = np.random.default_rng(0)
    a, b, c = [random.integers(-9, 10, shape) for shape in ((16, 8), (8, 8), (16, 8))]
    assert (multiply(plain, a, b, c) == a @ b + c).all()


def test_factors_have_eleven_bits(plain: Harness) -> None:
    one, zero = np.eye(8), np.zeros((16, 8))
    a = np.tile([1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-10 + 2.0**-23, -1 - 2.0**-11] * 2, (16, 1))
    kept = [1 + 2.0**-10, 1.0, 1 + 2.0**-10, -1.0] * 2
    assert (multiply(plain, a, one, zero) == kept).all()
    assert (multiply(plain, np.eye(16, 8), a[:8], zero)[:8] == kept).all()


@pytest.mark.parametrize(
    ("terms", "total"),
    [
        ([1.0, 2.0**-24], 1.0),  # each is cut off at the last bit of the largest
        ([1.0, 2.0**-24, 2.0**-24, 2.0**-24], 1.0),
        ([-1.0, -(2.0**-24)], -1.0),
        ([2.0**24, 1.0], 2.0**24),
        ([2.0**-127, 2.0**-127], 0.0),  # below the normal numbers
    ],
)
def test_sums_are_cut_off(plain: Harness, terms: list[float], total: float) -> None:
    a, b = np.zeros((16, 8)), np.zeros((8, 8))
    a[:, : len(terms)], b[: len(terms)] = terms, 1.0
    assert (multiply(plain, a, b, np.zeros((16, 8))) == total).all()
