from __future__ import annotations

import pytest
import torch

from experiments.analysis.path_length import path_length
from lipfast.errors import ArgumentError


def test_path_length_adds_up_the_moves() -> None:
    states = [
        {"w": torch.zeros(2), "b": torch.zeros(1), "steps": torch.tensor(0)},
        {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([2.0]), "steps": torch.tensor(5)},
        {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([-2.0]), "steps": torch.tensor(9)},
    ]
    assert path_length(states) == [0, 3, 7]
    assert path_length([]) == []
    with pytest.raises(ArgumentError, match="same parameters"):
        path_length([states[0], {"w": torch.zeros(3)}])
