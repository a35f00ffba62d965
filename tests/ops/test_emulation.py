"""Products that emulate float64 are found out, and nothing is proved of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lipfast
from lipfast.ops import emulation
from lipfast.ops.emulation import products_are_ieee
from tests.support.pretended_device import CUDA, on_device, pretended_device


@pytest.fixture(autouse=True)
def forgotten():
    emulation._keeps_small_entries.cache_clear()
    yield
    emulation._keeps_small_entries.cache_clear()


def sliced(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Fixed-point products: entries are rounded to 2^-60 of the largest of their row."""
    step = a.abs().amax(1, keepdim=True) * 2.0**-60
    return ((a / step).round() * step) @ b


def test_an_emulation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretended_device() as counts:
        assert products_are_ieee(CUDA)
        assert counts.syncs == 1
        assert products_are_ieee(CUDA)
        assert counts.syncs == 1
        monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
        assert not products_are_ieee(CUDA)
    monkeypatch.delenv("CUBLAS_EMULATE_DOUBLE_PRECISION")
    plain = torch.Tensor.__matmul__
    # Where products drop bits, the exact one is not found.
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: plain(a.float(), b.float()).double()
    )
    assert not bool(emulation._product_is_exact(16, torch.device("cpu")))
    monkeypatch.setattr(torch.Tensor, "__matmul__", plain)
    assert bool(emulation._product_is_exact(16, torch.device("cpu")))
    identity = torch.eye(16, dtype=torch.float64)
    a = torch.cat([identity * (1 + 2.0**-52), torch.full_like(identity, 2.0**80)], 1)
    b = torch.cat([identity, torch.zeros_like(identity)])
    assert not torch.equal(sliced(a, b), a @ b)


def test_nothing_is_proved_then(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    plan = lipfast.compile(model, torch.zeros(2, 4))
    state, x = on_device(dict(model.state_dict())), on_device(torch.randn(6, 4))
    with pretended_device():
        proved = plan.lower(state, x)
        assert proved.value > 0
        monkeypatch.setenv("CUBLAS_EMULATE_DOUBLE_PRECISION", "1")
        lower = plan.lower(state, x)
        assert lower.value == 0.0
        assert lower.jacobian.value == proved.jacobian.value
        assert "no difference of outputs could be proved" in lower.reason
