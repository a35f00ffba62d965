"""What models return: whatever holds tensors that can be seen, or a clear refusal."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import lipfast
from lipfast.errors import ArgumentError, LipfastError
from lipfast.plan.outputs import returned_tensors


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Any = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: Tensor
    name: str = "frozen"


class DictOfFields(OrderedDict):  # type: ignore[type-arg]
    """As the outputs of a well-known library: a dataclass that is a dictionary of its fields."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                self[field.name] = value


@dataclasses.dataclass
class Unregistered(DictOfFields):
    logits: Any = None
    hidden: Any = None


@dataclasses.dataclass
class Registered(DictOfFields):
    logits: Any = None
    hidden: Any = None


pytree.register_pytree_node(
    Registered,
    lambda value: (list(value.values()), list(value.keys())),
    lambda values, keys: Registered(**dict(zip(keys, values, strict=True))),
    serialized_type_name="tests.plan.test_outputs.Registered",
)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class OwnList(list):  # type: ignore[type-arg]
    pass


class OwnDict(collections.UserDict):  # type: ignore[type-arg]
    pass


class Holder:
    def __init__(self, value: Tensor) -> None:
        self.value = value


class Kind(enum.Enum):
    ONE = 1


class Returns(nn.Module):
    """Linear, then whatever a function makes of it."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        nn.init.orthogonal_(self.linear.weight)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.linear(x))


# With the square of what is found: the linear layer has norm 1.
SEEN: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "dataclass": (Answer, 1),
    "dataclass with two": (lambda y: Answer(y, 2 * y), 5),
    "nested in a dataclass": (lambda y: Answer(y, {"a": [2 * y, None]}), 5),
    "frozen dataclass": (Frozen, 1),
    "dictionary of fields": (lambda y: Unregistered(y, (2 * y, None)), 5),
    "registered with torch": (lambda y: Registered(y, (2 * y, None)), 5),
    "dataclass beside a tensor": (lambda y: (y, Answer(3 * y)), 10),
    "dataclass in a dictionary": (lambda y: {"a": y, "b": Unregistered(2 * y)}, 5),
    "named tuple": (lambda y: Pair(y, 2 * y), 5),
    "list of one's own": (lambda y: OwnList([y, y]), 2),
    "dictionary of one's own": (lambda y: OwnDict(a=y, b=None), 1),
    "defaultdict": (lambda y: collections.defaultdict(list, a=y), 1),
    "numbers and words": (lambda y: (y, None, 3, 2.5, True, "word", y.shape), 1),
    "dtype": (lambda y: (y, y.dtype, y.device, Kind.ONE), 1),
}
HIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "object": Holder,
    "object beside a tensor": lambda y: (y, Holder(y)),
    "set": lambda y: {y},
    "generator": lambda y: (value for value in (y, y)),
    "distribution": lambda y: torch.distributions.Normal(y, 1.0, validate_args=False),
    "array": lambda y: (y, np.zeros(3)),
    "function": lambda y: (y, print),
}
X = torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize("name", SEEN)
def test_tensors_in_what_is_returned_are_seen_by_all_calls(name: str) -> None:
    function, square = SEEN[name]
    model, norm = Returns(function), square**0.5
    before = dict(vars(model))
    assert lipfast.jacobian_norms(model, X).tolist() == pytest.approx([norm] * 4, rel=1e-5)
    found = lipfast.bounds(model, X)
    assert found.upper.value == pytest.approx(norm, rel=1e-5)
    assert found.upper.value >= found.lower.value == pytest.approx(norm, rel=1e-5)
    assert found.lower.certified
    assert lipfast.lower_bound(model, X).certified
    assert set(lipfast.compile(model, X).parameters) == set(model.state_dict())
    assert vars(model) == before


@pytest.mark.parametrize("name", HIDDEN)
def test_what_may_hide_tensors_is_refused_by_name(name: str) -> None:
    model = Returns(HIDDEN[name])
    calls: list[Callable[..., object]] = [
        lipfast.jacobian_norms,
        lipfast.lower_bound,
        lipfast.upper_bound,
        lipfast.compile,
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="does not see tensors: wrap it in a module"):
            call(model, X)


@pytest.mark.parametrize("outputs", [None, (None,), 3.0, {}, "word"], ids=str)
def test_no_tensor(outputs: object) -> None:
    model = Returns(lambda y: outputs)
    for call in (lipfast.jacobian_norms, lipfast.upper_bound):
        with pytest.raises(LipfastError, match="the model returns no tensor"):
            call(model, X)


def test_tensors_come_in_order() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    found = list(returned_tensors({"b": [first, Answer(second, "x")], "a": first}))
    assert [id(tensor) for tensor in found] == [id(first), id(second), id(first)]


class Flag(nn.Module):
    """Its own forward knows the mode, and has an attribute of its own that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Answer:
        y: Tensor = self.linear(x)
        return Answer(100 * y if self.training else y)


def test_the_mode_reaches_a_model_that_returns_a_dataclass() -> None:
    model = Flag().train()
    upper = lipfast.upper_bound(model, X)
    assert upper.value == pytest.approx(torch.linalg.matrix_norm(model.linear.weight, 2).item())
    assert model.training


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: (y, y.argmax(1)), "int64.*the others alone"),
        (lambda y: torch.complex(y, y), "complex64.*view_as_real"),
        (lambda y: y > 0, "bool"),
    ],
)
def test_outputs_without_a_jacobian(function: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.jacobian_norms(Returns(function), X)
