"""Plans that are used again, and the changes after which they are not."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.jacobian.norms import jacobian_norms
from lipfast.plan import cache
from lipfast.plan.cache import cached_plan
from lipfast.rules.pointwise import _pointwise
from lipfast.rules.registry import RULES


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts traces."""
    counted: list[int] = []
    trace = cache.trace

    def counting(*arguments: object) -> object:
        counted.append(1)
        return trace(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "trace", counting)
    return counted


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(0.1), nn.Linear(5, 2))


def truth(model: nn.Module, x: Tensor) -> Tensor:
    rows = [torch.autograd.functional.jacobian(model, sample[None]).reshape(-1, 3) for sample in x]
    return torch.linalg.matrix_norm(torch.stack(rows), 2)


def test_a_module_is_traced_once(x: Tensor, traces: list[int]) -> None:
    model = network()
    first = jacobian_norms(model, x)
    assert torch.equal(jacobian_norms(model, x[:1]), first[:1])
    jacobian_norms(model.train(), x)
    assert len(traces) == 1


def set_slope(model: nn.Sequential) -> None:
    model[1].negative_slope = 0.7


def replace_layer(model: nn.Sequential) -> None:
    model[1] = nn.ReLU()


def append_layer(model: nn.Sequential) -> None:
    model.append(nn.Linear(2, 2))


def widen(model: nn.Sequential) -> None:
    model[0], model[2] = nn.Linear(3, 7), nn.Linear(7, 2)


def drop_bias(model: nn.Sequential) -> None:
    model[2].bias = None


def add_hook(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda *arguments: 3.0 * arguments[2])


def patch_forward(model: nn.Sequential) -> None:
    original = model[2].forward
    model[2].forward = lambda x: -2.0 * original(x)


def parametrize(model: nn.Sequential) -> None:
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original0.mul_(3.0)


@pytest.mark.parametrize(
    "change",
    [
        set_slope,
        replace_layer,
        append_layer,
        widen,
        drop_bias,
        add_hook,
        patch_forward,
        parametrize,
    ],
)
def test_a_changed_module_is_not_stale(x: Tensor, change: Callable[[nn.Sequential], None]) -> None:
    model = network()
    before = jacobian_norms(model, x)
    change(model)
    after = jacobian_norms(model, x)
    torch.testing.assert_close(after, truth(model, x), rtol=1e-5, atol=0)
    if change is not drop_bias:
        assert not torch.allclose(before, after)


def test_new_weights_need_no_trace_and_are_not_stale(x: Tensor, traces: list[int]) -> None:
    model = network()
    before = jacobian_norms(model, x)
    model[0].weight = nn.Parameter(2 * model[0].weight.detach())
    with torch.no_grad():
        model[2].weight.mul_(3.0)
    model[0].bias.data = torch.zeros(5)
    after = jacobian_norms(model, x)
    assert len(traces) == 1
    torch.testing.assert_close(after, truth(model, x), rtol=1e-5, atol=0)
    assert not torch.allclose(before, after)


class Scaled(nn.Module):
    """A Python number, a tensor attribute and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.number = 1.0
        self.attribute = torch.ones(2)
        self.register_buffer("hidden", torch.ones(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x) * self.number * self.attribute * self.hidden
        return result


@pytest.mark.parametrize("name", ["number", "attribute", "hidden"])
def test_values_outside_the_state_dict_are_not_stale(x: Tensor, name: str) -> None:
    model = Scaled()
    first = cached_plan(model, x)
    assert first is not None
    with torch.no_grad():
        setattr(model, name, 5.0 * getattr(model, name))
    second = cached_plan(model, x)
    assert second is not None
    assert first.fingerprint != second.fingerprint


def test_models_that_cannot_be_traced_are_remembered(x: Tensor, traces: list[int]) -> None:
    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    model = Unknown()
    assert cached_plan(model, x) is None
    assert cached_plan(model, x) is None
    assert len(traces) == 1


def test_data_dependent_control_flow_has_no_plan(x: Tensor) -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if float(x.sum()) > 0 else 3 * x

    assert cached_plan(Branching(), x) is None


def test_entries_vanish_with_their_modules(x: Tensor) -> None:
    model = network()
    jacobian_norms(model, x)
    key = id(model)
    assert key in cache._PLANS
    del model
    gc.collect()
    assert key not in cache._PLANS


def test_a_rule_that_comes_later_counts(x: Tensor) -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.asinh(x)

    model = Inverse()
    before = dict(RULES)
    assert not lipfast.lower_bound(model, x).certified
    _pointwise("aten.asinh", 1.0)
    try:
        assert lipfast.lower_bound(model, x).certified
    finally:
        RULES.clear()
        RULES.update(before)


def test_a_plan_holds_as_long_as_the_constants_do() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.eye(3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight).tanh()

    model, x = Constant(), torch.zeros(2, 3)
    first = cached_plan(model, x)
    assert first is not None
    assert cached_plan(model, x) is first
    model.weight *= 2
    second = cached_plan(model, x)
    assert second is not None
    assert second.constants != first.constants
    assert lipfast.jacobian_norms(model, x).tolist() == pytest.approx([2.0, 2.0])
