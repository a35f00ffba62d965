"""torchvision's families trace, and give a finite bound or the known reason why not.

Run by ``make test-architectures``, in an environment of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip(
    "torchvision", reason="torchvision is not installed here: run 'make test-architectures'"
)

from bench.architectures import FAMILIES, SIZE, bound_family

pytestmark = pytest.mark.long


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name: str) -> None:
    family = FAMILIES[name]
    result = bound_family(family)
    assert result.plan.input_shapes == ((3, SIZE, SIZE),)
    assert result.plan.output_shapes == ((1000,),)
    assert result.bound.certified
    assert result.boxed.certified
    if family.finite:
        assert math.isfinite(result.bound.log_value)
    else:
        assert result.bound.log_value == math.inf
        assert "lipfast.Box" in (result.bound.reason or "")
    assert math.isfinite(result.boxed.log_value)
    assert result.quotient > 0
    assert math.log(result.quotient) < result.boxed.log_value
    assert torch.is_grad_enabled()
