"""State dicts that fit, and messages for those that do not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError, StateDictError
from lipfast.estimators.plan import Plan
from lipfast.plan.state import require_finite, stack


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


@pytest.fixture
def plan(model: nn.Module) -> Plan:
    return Plan.trace(model, torch.zeros(2, 4))


def test_fitting_state_dict(plan: Plan, model: nn.Module) -> None:
    resolved = plan.resolve(model.state_dict())
    assert list(resolved) == list(plan.parameters)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrapped_modules(plan: Plan, model: nn.Module, prefix: str) -> None:
    state_dict = {prefix + name: value for name, value in model.state_dict().items()}
    assert list(plan.resolve(state_dict)) == list(plan.parameters)


def test_wrong_shape_names_parameter_and_both_shapes(plan: Plan, model: nn.Module) -> None:
    state_dict = dict(model.state_dict(), **{"2.weight": torch.zeros(7, 5)})
    with pytest.raises(StateDictError, match=r"'2\.weight'.*\(7, 5\).*\(3, 5\)"):
        plan.check(state_dict)


def test_missing_and_unexpected_names(plan: Plan, model: nn.Module) -> None:
    state_dict = dict(model.state_dict())
    state_dict["9.weight"] = state_dict.pop("0.bias")
    with pytest.raises(StateDictError, match=r"lacks '0\.bias' \(5,\).*not have '9\.weight'"):
        plan.check(state_dict)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_name_the_parameter(plan: Plan, model: nn.Module, bad: float) -> None:
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    state_dict["2.weight"][1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"'2\.weight'.*1 non-finite"):
        plan.check(state_dict)


def test_infinities_that_cancel_are_found(plan: Plan, model: nn.Module) -> None:
    state_dict = {name: value.clone() for name, value in model.state_dict().items()}
    state_dict["0.bias"][0] = float("inf")
    state_dict["0.bias"][1] = -float("inf")
    with pytest.raises(NonFiniteError, match="2 non-finite entries \\(0 NaN, 2 Inf\\)"):
        plan.check(state_dict)


def test_finite_weights_whose_sum_overflows_pass(plan: Plan, model: nn.Module) -> None:
    state_dict = dict(model.state_dict(), **{"0.weight": torch.full((5, 4), 3e38)})
    plan.check(state_dict)


def test_integer_weights(plan: Plan, model: nn.Module) -> None:
    state_dict = dict(model.state_dict(), **{"0.weight": torch.ones(5, 4, dtype=torch.int32)})
    with pytest.raises(StateDictError, match=r"'0\.weight' has dtype torch\.int32"):
        plan.check(state_dict)


def test_things_that_are_no_state_dicts(plan: Plan, model: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=r"model\.state_dict\(\)"):
        plan.upper(model)  # type: ignore[call-overload]
    with pytest.raises(StateDictError, match="not a tensor"):
        plan.check(dict(model.state_dict(), **{"0.bias": [1.0]}))  # type: ignore[dict-item]


def test_entry_of_a_list_is_named(plan: Plan, model: nn.Module) -> None:
    good = model.state_dict()
    with pytest.raises(StateDictError, match=r"state dict 1: .*'0\.weight'"):
        plan.upper([good, dict(good, **{"0.weight": torch.zeros(1, 4)})])


def test_tied_weights_may_be_stored_once_but_not_differ() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    plan = Plan.trace(model, torch.zeros(2, 3))
    state_dict: dict[str, Tensor] = dict(model.state_dict())
    plan.check(state_dict)
    del state_dict["1.weight"]
    assert torch.equal(plan.resolve(state_dict)["1.weight"], model[0].weight)
    with pytest.raises(StateDictError, match="one tensor in the architecture"):
        plan.check(dict(state_dict, **{"1.weight": torch.zeros(3, 3)}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_floating_dtypes_work(plan: Plan, model: nn.Module, dtype: torch.dtype) -> None:
    state_dict = {name: value.to(dtype) for name, value in model.state_dict().items()}
    wide = {name: value.double() for name, value in state_dict.items()}
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    result, reference = plan.bounds(state_dict, x), plan.bounds(wide, x)
    assert result.upper.value == pytest.approx(reference.upper.value, rel=2e-6)
    assert result.lower.value == pytest.approx(reference.lower.value, rel=2e-6)
    assert result.lower.certified
    assert result.upper.certified


def test_stack() -> None:
    stacked = stack([{"a": torch.ones(2)}, {"a": torch.zeros(2)}], ["a"], torch.float64)
    assert torch.equal(stacked["a"], torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to("meta"), "'w' has no data"),
        (lambda t: t.to_sparse(), "'w' has layout torch.sparse_coo"),
    ],
)
def test_tensors_without_dense_data_are_named(change, message):
    with pytest.raises(StateDictError, match=message):
        require_finite({"w": change(torch.ones(2, 2))}, ["w"])


class Extra(nn.Module):
    """A layer with extra state."""

    def __init__(self, state: object) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(4, 3), state

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


STATES = {
    "dict": {"a": 1},
    "none": None,
    "text": "x",
    "number": 3,
    "bytes": b"abc",
    "tensor": torch.full((2,), math.nan),
    "integers": torch.zeros(3, dtype=torch.uint8),
    "array": np.zeros(2),
    "nested": [{"scale": torch.ones(2)}, None],
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_extra_state_is_no_part_of_a_function(state: object) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Extra(state), nn.ReLU()), torch.randn(5, 4)
    truth = float(torch.linalg.matrix_norm(model[0].layer.weight.detach().double(), 2))
    assert lipfast.upper_bound(model, x).value == pytest.approx(truth, rel=1e-5)
    for _ in range(2):  # the second time the plan is known
        assert float(lipfast.jacobian_norms(model, x).max()) <= truth * (1 + 1e-6)
    result = lipfast.bounds(model, x)
    assert result.lower.certified
    assert result.lower.value <= result.upper.value
    plan = Plan.trace(model, x)
    for other in STATES.values():
        plan.check({**model.state_dict(), "0._extra_state": other})  # type: ignore[dict-item]
    without = {n: v for n, v in model.state_dict().items() if not n.endswith("_extra_state")}
    assert plan.upper(without).value == result.upper.value


def test_arrays_of_numpy_are_tensors(plan: Plan, model: nn.Module) -> None:
    state_dict = {name: value.numpy() for name, value in model.state_dict().items()}
    state_dict["0.bias"].flags.writeable = False
    found = plan.upper(state_dict)  # type: ignore[call-overload]
    assert found.value == plan.upper(model.state_dict()).value
    with pytest.raises(StateDictError, match=r"'0\.bias' is a ndarray, not a tensor"):
        plan.check(dict(state_dict, **{"0.bias": np.array([None] * 5)}))


def test_counters_of_normalisations_may_be_missing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval()
    plan = Plan.trace(model, torch.zeros(2, 4))
    whole = model.state_dict()
    state_dict = {name: v for name, v in whole.items() if "num_batches" not in name}
    assert plan.upper(state_dict).value == plan.upper(whole).value
    with pytest.raises(StateDictError, match=r"lacks '1\.running_var'"):
        plan.check({name: v for name, v in whole.items() if "running_var" not in name})


class Counted(nn.Module):
    """A function of a normalisation's counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(x) / (1.0 + self.norm.num_batches_tracked.float())
        return result


def test_counters_that_a_function_depends_on_are_missed() -> None:
    model = Counted().eval()
    plan = Plan.trace(model, torch.zeros(2, 4))
    plan.check(model.state_dict())
    state_dict = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
    with pytest.raises(StateDictError, match=r"lacks 'norm\.num_batches_tracked', which the model"):
        plan.check(state_dict)


def test_tied_arrays_of_numpy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    plan = Plan.trace(model, torch.zeros(2, 3))
    state_dict = {name: value.numpy() for name, value in model.state_dict().items()}
    plan.check(state_dict)  # type: ignore[arg-type]
    with pytest.raises(StateDictError, match="one tensor in the architecture"):
        plan.check(dict(state_dict, **{"1.weight": np.zeros((3, 3), np.float32)}))  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # torch's, of what it deprecates
def test_quantised_weights_are_refused_by_name(plan: Plan, model: nn.Module) -> None:
    weight = torch.quantize_per_tensor(model.state_dict()["0.weight"], 0.1, 0, torch.qint8)
    with pytest.raises(StateDictError, match=r"'0\.weight' has dtype torch\.qint8.*dequantize"):
        plan.check(dict(model.state_dict(), **{"0.weight": weight}))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for call in (lipfast.compile, lipfast.jacobian_norms, lipfast.lower_bound, lipfast.bounds):
        with pytest.raises(ArgumentError, match=r"module '0' .*quantised weights"):
            call(quantised, torch.randn(3, 4))


@pytest.mark.parametrize("call", [lipfast.compile, lipfast.jacobian_norms, lipfast.upper_bound])
def test_modules_without_shapes_stay_without(call: Callable[..., object]) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ArgumentError, match=r"parameter '0\.weight' is not initialised"):
        call(model, torch.randn(3, 4))
    assert isinstance(model[0], nn.LazyLinear)


EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e8m0fnu]


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_numbers_of_eight_bits_are_bounded_as_they_are(
    plan: Plan, model: nn.Module, dtype: torch.dtype
) -> None:
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    wide = {name: value.float() for name, value in state.items()}
    assert plan.upper(state).value == plan.upper(wide).value
    state["0.weight"].view(torch.uint8)[0, 0] = 0xFF if dtype != torch.float8_e4m3fnuz else 0x80
    with pytest.raises(NonFiniteError, match=r"parameter '0\.weight' .* holds 1 non-finite"):
        plan.upper(state)
    packed = torch.zeros(5, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(StateDictError, match="float4_e2m1fn_x2; expected a floating dtype"):
        plan.upper({**wide, "0.weight": packed})
