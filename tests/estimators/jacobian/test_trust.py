"""What the checks before autograd cost, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import model_function
from lipfast.estimators.jacobian.trust import require_autograd
from tests.support.jacobian_cases import perceptron, samples


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = perceptron(6, 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        SIZES.append(len(x))
        result: Tensor = self.inner(x)
        return result


SIZES: list[int] = []


def test_a_few_samples_are_evaluated_whatever_their_number() -> None:
    model = Counted()
    for count in (1, 2, 300):
        x = samples(count, 6)
        with model_function(model, (x,)) as problem:
            SIZES.clear()
            require_autograd(problem, model, (x,))
        assert max(SIZES) <= 4
        assert sum(SIZES) <= 24


def test_batches_after_the_first_are_not_checked() -> None:
    model, x = Counted(), samples(12, 6)
    SIZES.clear()
    whole = lipfast.jacobian_norms(model, x[:4], method="rows")
    one = len(SIZES)
    SIZES.clear()
    loader: DataLoader[Tensor] = DataLoader(x, batch_size=4)  # type: ignore[arg-type]
    found = lipfast.jacobian_norms(model, loader, method="rows")
    assert len(SIZES) < 2 * one
    torch.testing.assert_close(found[:4], whole)


def test_branches_that_one_sample_in_the_middle_takes() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 5, 5 * x.detach(), self.layer(x))

    x = samples(40, 6)
    assert bool((lipfast.jacobian_norms(Branching(), x, method="rows") > 0).all())
    x[17, 0] = 6.0
    with pytest.raises(ArgumentError, match="not that of the function"):
        lipfast.jacobian_norms(Branching(), x, method="rows")
