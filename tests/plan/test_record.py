from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lipfast.estimators.plan import Plan
from lipfast.plan.record import record, resized


def mlp(width: int, slope: float = 0.1) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(6, width), nn.LeakyReLU(slope), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).eval()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, width, bias=False), nn.Linear(6, width, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [mlp, lambda n: Residual(n).eval(), lambda n: Tied(n).eval()])
def test_a_resized_plan_is_the_traced_one(make: object) -> None:
    small, large = make(4), make(9)  # type: ignore[operator]
    assert record(small, (X,)) == record(large, (X,)) is not None
    expected = Plan.trace(large, X)
    found = resized(Plan.trace(small, X), large)
    assert found == expected
    assert found.fingerprint == expected.fingerprint
    assert dict(found.parameters) == {
        name: tuple(v.shape) for name, v in large.state_dict().items()
    }


class Scaled(nn.Module):
    """The same modules and parameters; what differs is inside forward."""

    def __init__(self, width: int, how: str) -> None:
        super().__init__()
        self.layer, self.width, self.how = nn.Linear(6, width), width, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.how == "scalar":
            return y * (1.0 / self.width)
        if self.how == "constant":
            return y * torch.tensor(float(self.width))
        if self.how == "branch":
            return torch.relu(y) if self.width > 5 else torch.tanh(y)
        if self.how == "size":
            return y.reshape(x.shape[0], self.width)[:, : self.width - 1]
        return y


@pytest.mark.parametrize("how", ["scalar", "constant", "branch", "size"])
def test_whatever_differs_in_the_calls_differs_in_the_record(how: str) -> None:
    records = [record(Scaled(width, how).eval(), (X,)) for width in (4, 9)]
    assert records[0] != records[1]
    assert record(Scaled(4, how).eval(), (X,)) == records[0]


class Buffered(nn.Module):
    """What differs is a buffer that no checkpoint holds."""

    def __init__(self, buffer: Tensor, *, persistent: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("buffer", buffer, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.buffer


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torch.tensor(1.0), torch.tensor(1000.0)),
        (torch.tensor(1), torch.tensor(1.0)),
        (torch.tensor(2**53), torch.tensor(2**53 + 1)),
        (torch.ones(4), torch.ones(1)),
    ],
    ids=["value", "dtype", "large integer", "shape"],
)
def test_buffers_that_are_not_in_the_state_dict_go_by_their_content(
    first: Tensor, second: Tensor
) -> None:
    records = [record(Buffered(b, persistent=False).eval(), (X,)) for b in (first, second)]
    assert records[0] != records[1]
    assert record(Buffered(first.clone(), persistent=False).eval(), (X,)) == records[0]
    persistent = [record(Buffered(b, persistent=True).eval(), (X,)) for b in (first, second)]
    assert persistent[0] == persistent[1] != records[0]


def test_large_buffers_that_are_not_in_the_state_dict_give_no_record() -> None:
    large = nn.Sequential(nn.Linear(6, 5000), Buffered(torch.ones(4), persistent=False)).eval()
    large[1].layer = nn.Linear(5000, 5000)
    large[1].buffer = torch.ones(5000)
    assert record(large, (X,)) is None


def test_different_networks_differ() -> None:
    base = record(mlp(4), (X,))
    assert record(mlp(4, slope=0.2), (X,)) != base
    assert record(mlp(4), (X[:, :6].double().float()[:1],)) != base
    assert record(Residual(4).eval(), (X,)) != base
    assert record(nn.Sequential(nn.Linear(6, 4)).eval(), (X,)) != base


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else -self.layer(x)


def test_no_record_where_calls_do_not_tell() -> None:
    assert record(DataDependent().eval(), (X,)) is None
    assert record(nn.Identity(), (X,)) is None
