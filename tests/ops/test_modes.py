from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from lipfast.ops.modes import forward_mode


def test_forward_mode_of_several_threads() -> None:
    """Without taking turns one of them finds its level of dual numbers gone."""
    x = torch.linspace(0.1, 1.0, 64)

    def function(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.sin(x)
        return x

    def slope(_: int) -> Tensor:
        with forward_mode():
            tangent: Tensor = torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return tangent

    expected = slope(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(slope, range(200)))
