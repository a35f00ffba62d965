"""Modules and the process are as they were, at whatever line of lipfast's own Ctrl-C comes."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.plan.batch_first import samples_in_front
from lipfast.plan.conditions import buffers_known
from lipfast.plan.export import _quiet_export
from lipfast.plan.kept_values import KeptTable
from lipfast.plan.modules import evaluation_mode
from tests.support.interrupts import InterruptedAt
from tests.support.writers import WIDTH, Writer, held, process_state

X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
FILES = tuple(
    f"lipfast/{name}.py"
    for name in (
        *("plan/modules", "plan/kept", "plan/kept_values", "plan/export", "plan/batch_first"),
        *("plan/conditions", "plan/strays", "ops/restoring", "estimators/jacobian/function"),
    )
)


class Conditional(nn.Module):
    """Everything that a trace changes for a while: attention, a condition, modes of training."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop, self.norm = nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("doubled", torch.tensor(1))
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if bool(self.doubled):
            x = 2 * x
        y = self.norm(self.drop(self.layer(x)))[:, None]
        result: Tensor = y[:, 0] + self.attention(y, y, y)[0][:, 0]
        return result


def _write(model: Writer, x: Tensor) -> None:
    model.scale.data.fill_(9.0)
    model.count += 1
    model.table["deep"]["list"].append(x)
    model.train()
    torch.rand(1)


def make_writer() -> nn.Module:
    torch.manual_seed(0)
    return Writer(_write).train()


def everything(model: nn.Module) -> str:
    loud = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    flags = [(module.training, "forward" in vars(module)) for module in model.modules()]
    process = (
        *(loud.level, loud.propagate, len(loud.handlers), id(sys.stderr), id(warnings.filters)),
        *(torch._C._len_torch_function_stack(), torch.get_default_dtype()),
    )
    return repr((held(model), flags, process, process_state()))


def _evaluate(model: nn.Module) -> None:
    with evaluation_mode(model), torch.no_grad():
        model(X)
        with evaluation_mode(model):
            model(X)


def _require_unchanged(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], object], *numbers: int
) -> int:
    model = make()
    before = everything(model)
    with InterruptedAt(FILES, numbers) as trace:
        try:
            call(model)
        except KeyboardInterrupt:
            assert trace.raised
        else:
            assert not trace.raised, "the interrupt was lost"
    assert everything(model) == before, numbers
    return trace.lines


def _everywhere(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], object], times: int
) -> None:
    total = _require_unchanged(make, call)
    assert total > times
    for index in range(times):
        number = 1 + index * total // times
        _require_unchanged(make, call, number)
        _require_unchanged(make, call, number, number + 1 + index % 5)


def test_evaluations() -> None:
    _everywhere(make_writer, _evaluate, 60)


def _prepare(model: nn.Module) -> None:
    with (
        evaluation_mode(model),
        samples_in_front(model),
        buffers_known({}, [], model),
        _quiet_export(logging.NullHandler()),
    ):
        pass


def test_what_is_changed_for_a_trace() -> None:
    _everywhere(Conditional, _prepare, 60)


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": lambda model: lipfast.compile(model, X),
    "rows": lambda model: lipfast.jacobian_norms(model, X, method="rows"),
    "create_graph": lambda model: lipfast.jacobian_norms(model, X, create_graph=True),
}


def test_while_a_module_is_without_attributes() -> None:
    """The interrupt comes between the clearing of a module's dictionary and its filling."""
    model = make_writer()
    before, seen = everything(model), []
    plain = KeptTable.restore

    def interrupted(kept: KeptTable) -> None:
        if kept.value is vars(model) and not seen:
            seen.append(True)
            kept.value.clear()
            raise KeyboardInterrupt
        plain(kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KeptTable, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt), evaluation_mode(model):
            model(X)
    assert seen
    assert everything(model) == before


def test_jacobian_norms() -> None:
    _everywhere(Conditional, CALLS["rows"], 8)


@pytest.mark.long
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("make", [make_writer, Conditional])
def test_calls_at_many_lines(name: str, make: Callable[[], nn.Module]) -> None:
    if make is make_writer and name == "compile":
        pytest.skip("what writes its parameters is refused")
    _everywhere(make, CALLS[name], 10 if name == "compile" else 200)
