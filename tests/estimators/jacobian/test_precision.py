"""In which precision a model computes, and in which others it can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipfast.estimators.jacobian.function import model_function
from lipfast.estimators.jacobian.precision import other_precision
from tests.support.jacobian_cases import perceptron, samples


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.eye(6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_precision(dtype: torch.dtype) -> None:
    model, x = perceptron(6, 9, 4).to(dtype), samples(3, 6).to(dtype)
    with model_function(model, (x,)) as problem, other_precision(model, (x,), problem) as other:
        again = other()
        assert again is not None and other() is again
        assert again.x.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
        found = again.function(x.to(again.x.dtype))
        torch.testing.assert_close(found.to(dtype), problem.function(x), rtol=1e-5, atol=1e-6)


def test_none_where_a_model_insists_on_its_dtype() -> None:
    model, x = Constant(), samples(3, 6)
    with model_function(model, (x,)) as problem, other_precision(model, (x,), problem) as other:
        assert other() is None
