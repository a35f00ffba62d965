"""Every kind of data in every call: the same samples, read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.samples import sample_batches
from tests.support.jacobian_cases import norms, perceptron, samples

X = samples(60, 4)
MODEL = perceptron(4, 8, 3)
PLAN = lipfast.compile(MODEL, X[:2])
STATE = MODEL.state_dict()


class OnePass(IterableDataset[Tensor]):
    """A stream that is gone once it was read."""

    def __init__(self, x: Tensor) -> None:
        self.left = list(x)

    def __iter__(self) -> Iterator[Tensor]:
        while self.left:
            yield self.left.pop(0)


class Nested(Dataset[tuple[tuple[Tensor, Tensor], int]]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], int]:
        if index >= len(self.x):
            raise IndexError
        return (self.x[index], self.y[index]), index


KINDS: dict[str, Callable[[], object]] = {
    "tensor": lambda: X,
    "tuple": lambda: (X,),
    "list": lambda: [X],
    "data set": lambda: TensorDataset(X),
    "labels": lambda: TensorDataset(X, torch.zeros(60)),
    "loader": lambda: DataLoader(X, batch_size=16),
    "loader with labels": lambda: DataLoader(TensorDataset(X, torch.zeros(60)), batch_size=7),
    "stream": lambda: OnePass(X),
    "loader of a stream": lambda: DataLoader(OnePass(X), batch_size=16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_call_takes_every_kind(kind: str) -> None:
    make, generator = KINDS[kind], torch.get_rng_state()
    expected = lipfast.bounds(MODEL, X)
    found = lipfast.bounds(MODEL, make(), per_sample=True)
    lowers = [
        found.lower,
        lipfast.lower_bound(MODEL, make()),
        PLAN.lower(STATE, make()),
        PLAN.bounds(STATE, make()).lower,
        *PLAN.lower([STATE, STATE], make()),
        *(result.lower for result in PLAN.bounds([STATE, STATE], make())),
    ]
    for lower in lowers:
        assert lower.certified
        assert (lower.samples, lower.sample) == (60, expected.lower.sample)
        assert lower.value == pytest.approx(expected.lower.value, rel=1e-6)
        assert lower.rms == pytest.approx(expected.lower.rms, rel=1e-6)
    assert found.upper == expected.upper
    assert lipfast.upper_bound(MODEL, make()) == expected.upper
    values = lipfast.jacobian_norms(MODEL, make())
    torch.testing.assert_close(values.double(), norms(MODEL, X), rtol=1e-5, atol=0)
    assert found.lower.per_sample is not None
    torch.testing.assert_close(found.lower.per_sample, values, rtol=1e-6, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_stream_is_read_once() -> None:
    stream = OnePass(X)
    assert lipfast.bounds(MODEL, stream).lower.samples == 60
    assert stream.left == []
    with pytest.raises(ArgumentError, match="no samples"):
        lipfast.bounds(MODEL, stream)


def test_the_largest_sample_of_each_network() -> None:
    states = [perceptron(4, 8, 3, seed=seed).state_dict() for seed in range(6)]
    whole = PLAN.lower(states, X, per_sample=True)
    batches = PLAN.lower(states, DataLoader(X, batch_size=7), per_sample=True)
    assert len({lower.sample for lower in whole}) > 1
    for first, second in zip(whole, batches, strict=True):
        assert first.sample == second.sample
        assert second.value == pytest.approx(first.value, rel=1e-6)
        assert second.per_sample is not None
        assert int(second.per_sample.argmax()) == second.sample
    assert PLAN.lower([], DataLoader(X)) == []


@pytest.mark.parametrize("method", ["auto", "rows", "lanczos"])
def test_details_of_batches(method: str) -> None:
    whole = lipfast.jacobian_norms(MODEL, X, method=method, details=True)
    found = lipfast.jacobian_norms(MODEL, DataLoader(X, batch_size=16), method=method, details=True)
    assert found.method == whole.method
    torch.testing.assert_close(found.values, whole.values)
    for name in ("residuals", "passes"):
        value = getattr(found, name)
        assert (value is None) == (getattr(whole, name) is None)
        assert value is None or value.shape == (60,)


def test_gradients_need_tensors() -> None:
    with pytest.raises(ArgumentError, match="create_graph needs tensors"):
        lipfast.jacobian_norms(MODEL, TensorDataset(X), create_graph=True)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) + self.second(y)


@pytest.mark.parametrize("kind", ["tuple", "list", "data set", "loader"])
def test_several_inputs(kind: str) -> None:
    y, model = samples(60, 2, seed=9), TwoInputs()
    data: object = {
        "tuple": (X, y),
        "list": [X, y],
        "data set": Nested(X, y),
        "loader": DataLoader(Nested(X, y), batch_size=16),
    }[kind]
    plan = lipfast.compile(model, (X, y))
    found = lipfast.bounds(model, data)
    truth = lipfast.jacobian_norms(model, (X, y))
    torch.testing.assert_close(lipfast.jacobian_norms(model, data), truth)
    for lower in (
        found.lower,
        lipfast.lower_bound(model, data),
        plan.lower(model.state_dict(), data),
        plan.bounds(model.state_dict(), data, norm=2).lower,
    ):
        assert lower.value == pytest.approx(float(truth.max()), rel=1e-5)
        assert lower.reason == "the certificate needs a model with one input"
        assert lower.points.shape == (2, 6)
    assert found.upper.certified
    assert found.upper == lipfast.upper_bound(model, data)
    assert found.lower.value <= found.upper.value
    with pytest.raises(ArgumentError, match="2 inputs and the data 1"):
        plan.lower(model.state_dict(), X)
    with pytest.raises(ArgumentError, match="1 inputs and the data 2"):
        PLAN.bounds(STATE, (X, y))


CALLS: dict[str, Callable[[object], object]] = {
    "bounds": lambda data: lipfast.bounds(MODEL, data),
    "lower_bound": lambda data: lipfast.lower_bound(MODEL, data),
    "jacobian_norms": lambda data: lipfast.jacobian_norms(MODEL, data),
    "Plan.lower": lambda data: PLAN.lower(STATE, data),
    "Plan.bounds": lambda data: PLAN.bounds(STATE, data),
}
broken = X.clone()
broken[37, 1] = torch.nan
BAD: dict[str, tuple[object, type[Exception], str]] = {
    "text": ("data", ArgumentError, "not str|must be a tensor, not str"),
    "numbers": ([1.0, 2.0], ArgumentError, "input 0|inputs and the data"),
    "nothing": ((), ArgumentError, "no inputs"),
    "no batch": (DataLoader(torch.ones(0, 4)), ArgumentError, "no samples"),
    "no samples": (torch.ones(0, 4), ArgumentError, "no samples"),
    "one number": (torch.tensor(1.0), ArgumentError, "first dimension"),
    "integers": (TensorDataset(torch.zeros(3, 4).long()), ArgumentError, "torch.int64"),
    "keys": (DataLoader([{"pixels": torch.ones(4)}]), ArgumentError, "dict with the keys pixels"),
    "not alike": (
        DataLoader([torch.ones(4), torch.ones(5)], batch_size=1),
        ArgumentError,
        r"sample 1 on|\(1, 5\); expected \(samples, 4\)",
    ),
    "not finite": (DataLoader(broken, batch_size=10), NonFiniteError, "first is sample 37"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("call", CALLS)
def test_bad_data(call: str, kind: str) -> None:
    data, error, message = BAD[kind]
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        CALLS[call](data)
    assert torch.equal(torch.get_rng_state(), generator)


def test_batches_must_be_alike() -> None:
    loader = DataLoader([torch.ones(2), torch.ones(3)], batch_size=1)
    with pytest.raises(ArgumentError, match="sample 1 on"):
        list(sample_batches(loader))


def test_nothing_of_the_callers_is_changed() -> None:
    x = X.clone().requires_grad_()
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for data in (x, TensorDataset(x.detach()), DataLoader(x.detach(), shuffle=True, batch_size=9)):
        generator = torch.get_rng_state()
        lipfast.bounds(model, data, domain=lipfast.Ball(3.0))
        lipfast.jacobian_norms(model, data)
        assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x.detach(), X)
    assert x.grad is None
    assert model.training and model[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
