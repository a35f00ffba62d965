"""What a timing on a device is compared with; needs no device."""

from __future__ import annotations

import pytest

from bench.gpu import Case, Limits

# An H100 without tensor cores for float64.
LIMITS = Limits(bandwidth=3.35e12, float32=67e12, float64=34e12, tf32=495e12)


def jacobians(outputs: int, inputs: int) -> Case:
    operations = float(outputs * (outputs + 1) * inputs)
    return Case("", lambda: None, 4.0 * outputs * inputs, operations, double=True)


def test_operations_of_float64_have_the_limit_of_float64() -> None:
    assert LIMITS.of(jacobians(10, 784)) == (pytest.approx(9.36e-6, rel=1e-3), "memory")
    assert LIMITS.of(jacobians(39, 784))[1] == "memory"
    assert LIMITS.of(jacobians(41, 784))[1] == "arithmetic"
    single = Case("", lambda: None, 0.0, 67e9)
    assert LIMITS.of(single) == (pytest.approx(1.0), "arithmetic")
