from __future__ import annotations

import pytest
import torch
from torch import nn

from experiments.analysis.perturbation import perturbed_estimates
from lipfast.errors import ArgumentError


def test_perturbed_estimates_of_a_known_function(bump: nn.Module) -> None:
    x = torch.tensor([[0.0, 0.0], [0.3, 1.0]])
    moved = torch.tensor([[0.0, 0.0], [0.5, 1.0]])
    found = perturbed_estimates(bump, x, moved)
    assert (found.clean, found.perturbed, found.mean) == pytest.approx((0, 3, 1.5))
    assert found.quotient == pytest.approx(0.3 / 0.2, rel=1e-5)
    assert found.radius == pytest.approx(0.2)
    assert perturbed_estimates(bump, moved, moved).ratio == 1
    assert torch.tensor(perturbed_estimates(bump, x, x).quotient).isnan()
    with pytest.raises(ArgumentError, match="differ"):
        perturbed_estimates(bump, x, x[:1])
