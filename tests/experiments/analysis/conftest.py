from __future__ import annotations

import pytest
import torch
from torch import nn


@pytest.fixture
def bump() -> nn.Sequential:
    """f(x) = 3 relu(x_1 - .4) - 3 relu(x_1 - .6): slope 3 between, 0 outside."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([-0.4, -0.6]))
        model[2].weight.copy_(torch.tensor([[3.0, -3.0]]))
        model[2].bias.zero_()
    return model.eval()
