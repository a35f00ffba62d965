from __future__ import annotations

import torch
from torch.nn import functional

from experiments.losses import network_losses


def test_mse_sums_over_classes() -> None:
    outputs = torch.randn(3, 10, 4)
    labels = torch.tensor([1, 0, 9, 5])
    targets = 2 * functional.one_hot(labels, 10).t().float()
    expected = (outputs - targets).square().sum(dim=1).mean(dim=1)
    torch.testing.assert_close(network_losses("mse", outputs, labels, target_scale=2), expected)
