"""Conditions of a model on its buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import StateDictError, TraceError
from lipfast.estimators.plan import Plan
from lipfast.plan import conditions


class Deciding(nn.Module):
    """What it computes depends on buffers: a flag, a number, comparisons of them, entries."""

    def __init__(self, flag: bool = True, steps: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3)
        self.register_buffer("flag", torch.tensor(flag))
        self.register_buffer("steps", torch.tensor(steps))
        self.register_buffer("limits", torch.tensor([2.0, 3.0]))
        self.register_buffer("kept", torch.tensor(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            x = x * 2
        for _ in range(int(self.steps)):
            x = self.layer(x)
        if (self.limits > 1).all() and (1 - self.kept).item() == self.flag.dim():
            x = x * self.limits[0]
        return x


@pytest.mark.parametrize(("flag", "steps"), [(True, 1), (False, 2)])
def test_they_are_decided_by_the_values(flag: bool, steps: int) -> None:
    model = Deciding(flag, steps).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight = model.layer.weight.detach().double()
    matrix = (4 if flag else 2) * torch.linalg.matrix_power(weight, steps)
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    bounds = lipfast.bounds(model, torch.randn(3, 3))
    assert truth * (1 - 1e-13) <= bounds.upper.value <= truth * (1 + 3e-6)
    assert bounds.lower.certified
    assert "forward" not in vars(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@dataclass
class Output:
    """What `torch.export` takes only once it is unpacked."""

    y: Tensor


class DecidingInAClass(Deciding):
    def forward(self, x: Tensor) -> Any:
        return Output(super().forward(x))


@pytest.mark.parametrize("kind", [Deciding, DecidingInAClass])
def test_they_are_decided_where_the_module_is_evaluated_around_the_trace(
    kind: type[Deciding],
) -> None:
    model = kind().eval()
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    assert lipfast.lower_bound(model, x).certified


def test_state_dicts_with_other_values_are_refused(tmp_path: Path) -> None:
    model = Deciding().eval()
    Plan.trace(model, torch.zeros(2, 3)).save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    plan.upper(model.state_dict())
    with pytest.raises(StateDictError, match="state dict 1: buffer 'steps' is 5, and the plan"):
        plan.upper([model.state_dict(), Deciding(steps=5).state_dict()])
    with pytest.raises(StateDictError, match="buffer 'flag' is False"):
        plan.check(Deciding(flag=False).state_dict())
    other = {**model.state_dict(), "layer.weight": torch.eye(3)}
    assert plan.upper(other).value >= 4.0


def test_conditions_on_the_input_stay_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else 2 * x

    with pytest.raises(TraceError, match="Branching decides by the values of a tensor"):
        Plan.trace(Branching(), torch.zeros(2, 3))


def test_conditions_on_large_buffers_stay_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "_MOST_READ", 0)
    with pytest.raises(TraceError, match="Deciding decides by the values of a tensor"):
        Plan.trace(Deciding(), torch.zeros(2, 3))


@pytest.mark.parametrize("write", ["add_", "+=", "[]", "fill_"])
def test_a_buffer_that_is_written_is_not_taken_for_its_old_value(write: str) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            count = self.count.clone()
            if write == "+=":
                count += 1
            elif write == "[]":
                count[...] = 1
            else:
                getattr(count, write)(1)
            return x * 2 if count > 0 else x

    with pytest.raises(TraceError, match="Counting decides by the values of a tensor"):
        Plan.trace(Counting(), torch.zeros(2, 3))


class Written(nn.Module):
    """Asks for a value that is a buffer's no longer: it is -1."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("flag", torch.tensor(1.0))
        self.register_buffer("large", -torch.ones(100))
        self.scale = nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> Tensor:
        value = self.flag.clone()
        self.write(self, value)
        return x if value > 0 else 100 * x


def unseen(module: Any, value: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        value.mul_(module.scale)


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "a parameter": lambda module, value: value.mul_(module.scale),
    "a copy": lambda module, value: value.copy_(module.scale),
    "a large buffer": lambda module, value: value.add_(module.large.sum()),
    "a constant": lambda module, value: value.add_(torch.full((), -2.0)),
    "an entry": lambda module, value: value.__setitem__((), module.scale),
    "an alias": lambda module, value: value.detach().mul_(module.scale),
    "a list": lambda module, value: torch._foreach_mul_([value], [module.scale]),
    "out": lambda module, value: torch.mul(module.scale, 1.0, out=value),
    "data": lambda module, value: setattr(value, "data", torch.full((), -1.0)),
    "storage": lambda module, value: value.set_(torch.full((), -1.0)),
    "an op": lambda module, value: torch.ops.aten.mul_(value, module.scale),
    "an overload": lambda module, value: torch.ops.aten.mul_.Tensor(value, module.scale),
    "an overload that copies": lambda m, value: torch.ops.aten.copy_.default(value, m.scale),
    "unseen": unseen,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_else_is_written_is_no_known_value(write: Callable[[Any, Tensor], object]) -> None:
    with pytest.raises(TraceError, match="decides by"):
        Plan.trace(Written(write), torch.ones(2, 3))


@pytest.mark.parametrize(
    "outputs",
    [
        lambda flag, x: x / float(flag + x.shape[0]),
        lambda flag, x: x if flag * x.shape[0] > 3 else 100 * x,
        lambda flag, x: x * (flag * len(x)).item(),
        lambda flag, x: x if x[int(flag) + 4 :].shape[0] > 0 else 100 * x,
        lambda flag, x: x if flag.expand(9)[: min(x.shape[0], 9)].sum() > 5 else 100 * x,
        lambda flag, x: x * len(x.split(int(flag) + 2)),
    ],
    ids=["a number", "a condition", "len", "a slice", "a part", "pieces"],
)
def test_the_number_of_samples_is_no_known_value(
    outputs: Callable[[Tensor, Tensor], Tensor],
) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flag", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return outputs(self.flag, x)

    with pytest.raises(TraceError):
        Plan.trace(Counting(), torch.ones(2, 3))
