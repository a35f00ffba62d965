"""What a score depends on beside the weights and the plan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lipfast.estimators.plan import Plan
from lipfast.scoring.options import METHOD, Options, method_of


class Gated(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(
    ("model", "shape", "method"),
    [
        (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,), 1),
        (nn.Linear(100, 90), (100,), METHOD),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)), (2, 4, 4), METHOD),
        (nn.Sequential(nn.Linear(4, 5), Gated()), (4,), METHOD),
    ],
    ids=["chain", "Lanczos", "convolution", "composition"],
)
def test_plans_whose_scores_changed_have_the_newest_method(
    model: nn.Module, shape: tuple[int, ...], method: int
) -> None:
    plan = Plan.trace(model.eval(), torch.zeros(2, *shape))
    assert method_of(plan) == method


def test_another_method_is_another_fingerprint() -> None:
    options = Options()
    assert options.fingerprint("plan", "data", 1) != options.fingerprint("plan", "data")
