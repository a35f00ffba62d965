"""Explicit Jacobians in blocks, by rows and by columns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.linearization import Linearization, footprint
from lipfast.estimators.jacobian.norms import jacobian_norms
from lipfast.estimators.jacobian.rows import explicit_jacobians
from tests.support.jacobian_cases import (
    ACTIVATIONS,
    jacobians,
    norms,
    perceptron,
    samples,
    small_convolutional,
)

NORMS = [1, 2, math.inf]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "widths", [(7, 1), (6, 9, 3), (1, 5, 2), (3, 17, 33), (5, 7, 9, 11, 4)], ids=str
)
def test_activations_depths_and_widths(
    capability: str, widths: tuple[int, ...], activation: str
) -> None:
    model, x = perceptron(*widths, activation=activation), samples(4, widths[0])
    explicit = jacobians(model, x)
    for norm in NORMS:
        truth = torch.linalg.matrix_norm(explicit, norm)
        result = jacobian_norms(model, x, norm=norm, method="rows")
        assert float((result.double() - truth).abs().max() / truth.max()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("memory", [1, 1 << 14, 1 << 30])
@pytest.mark.parametrize("widths", [(40, 9), (9, 40), (72, 66), (66, 72)], ids=str)
def test_memory_budgets(
    widths: tuple[int, int], memory: int, norm: float, dtype: torch.dtype
) -> None:
    model = perceptron(widths[0], 12, widths[1]).to(dtype)
    x = samples(3, widths[0]).to(dtype)
    result = jacobian_norms(model, x, norm=norm, method="rows", memory=memory)
    truth = norms(model, x, norm)
    assert float((result.double() / truth - 1).abs().max()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_convolutions(norm: float, memory: int) -> None:
    model, x = small_convolutional(), samples(5, 2, 8, 8)
    result = jacobian_norms(model, x, norm=norm, memory=memory)
    truth = norms(model, x, norm)
    assert float((result.double() / truth - 1).abs().max()) <= 1e-5
    assert all(module.training for module in model.modules())


def test_the_budget_limits_the_samples_of_a_block() -> None:
    model = perceptron(20, 50, 10)
    seen: list[int] = []

    def function(x: Tensor) -> Tensor:
        seen.append(len(x))
        result: Tensor = model(x)
        return result

    problem = SampleFunction(function, samples(64, 20), 10, tuple(model.parameters()))
    with differentiating():
        size = footprint(problem)
        per_sample = 4 * (20 + 50 + 10)
        assert per_sample / 2 <= size.saved <= 3 * per_sample
        assert size.largest == 4 * 50
        blocks = list(explicit_jacobians(problem, 100_000))
    assert sum(len(block) for block in blocks) == 64
    assert max(seen) < 16
    # Blocks of nearly equal size: none of a single sample.
    assert min(len(block) for block in blocks) >= max(len(block) for block in blocks) - 1


def test_rows_and_columns_agree() -> None:
    model, x = perceptron(4, 6, 5), samples(3, 4)
    with differentiating():
        linear = Linearization(model.requires_grad_(False), x)
        rows, columns = linear.rows(0, 5), linear.columns(0, 4)
        assert torch.equal(linear.rows(2, 4), rows[:, 2:4])
    torch.testing.assert_close(rows, columns.mT)
    torch.testing.assert_close(rows.double(), jacobians(model, x), rtol=1e-5, atol=1e-6)


def test_attention_and_recurrent_models() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(3, 6, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.cell(x)[0][:, -1])
            return result

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True)
    for model, x in ((Recurrent(), samples(3, 5, 3)), (layer, samples(2, 4, 6))):
        expected = [
            torch.linalg.matrix_norm(
                torch.autograd.functional.jacobian(model.eval(), sample[None]).reshape(
                    -1, sample.numel()
                ),
                2,
            )
            for sample in x
        ]
        torch.testing.assert_close(
            jacobian_norms(model, x), torch.stack(expected), rtol=1e-5, atol=0
        )
