"""Tracing: what becomes of a model, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, TraceError, UnsupportedOpError
from lipfast.estimators.plan import Plan
from lipfast.plan.modules import evaluation_mode, unwrap
from lipfast.plan.trace import trace
from lipfast.rules import RULES

DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


def ops(plan: Plan) -> list[str]:
    return [node.op for node in plan.graph.nodes]


def test_chain_of_linear_layers() -> None:
    plan = Plan.trace(mlp(), torch.zeros(3, 4))
    assert ops(plan) == ["input", "aten.linear", "aten.relu", "aten.linear"]
    assert plan.input_shapes == ((4,),)
    assert plan.output_shapes == ((3,),)
    assert dict(plan.parameters) == {
        "0.weight": (5, 4),
        "0.bias": (5,),
        "3.weight": (3, 5),
        "3.bias": (3,),
    }
    assert [layer.name for layer in plan.layers] == ["0", "3"]
    assert plan.graph.nodes[1].module == "0"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_number_of_example_samples_does_not_matter(batch: int) -> None:
    reference = Plan.trace(mlp(), torch.zeros(3, 4))
    assert Plan.trace(mlp(), torch.zeros(batch, 4)).fingerprint == reference.fingerprint


def test_model_is_left_as_it_was_found() -> None:
    model = mlp()
    model[0].eval()
    model[3].bias.requires_grad_(False)
    calls: list[int] = []
    model[1].register_forward_hook(lambda module, args, output: calls.append(1))
    flags = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(value) for value in model.parameters()]
    generator = torch.get_rng_state()

    Plan.trace(model, torch.zeros(3, 4))

    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert [id(value) for value in model.parameters()] == identities
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert len(model[1]._forward_hooks) == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_model_is_left_as_it_was_found_when_tracing_fails() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    model = nn.Sequential(nn.Linear(2, 2), Broken())
    with pytest.raises(TraceError, match="no such luck"):
        Plan.trace(model, torch.zeros(2, 2))
    assert all(module.training for module in model.modules())


def test_overridden_train_is_not_called() -> None:
    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() was called")

    model = Merging(2, 2)
    Plan.trace(model, torch.zeros(2, 2))
    assert model.training


def test_wrapped_models() -> None:
    reference = Plan.trace(mlp(), torch.zeros(2, 4)).fingerprint
    assert Plan.trace(nn.DataParallel(mlp()), torch.zeros(2, 4)).fingerprint == reference
    compiled = torch.compile(mlp())
    assert isinstance(unwrap(compiled), nn.Sequential)
    assert Plan.trace(compiled, torch.zeros(2, 4)).fingerprint == reference


def test_module_compiled_in_place_is_restored() -> None:
    model = mlp()
    model.compile()
    before = model._compiled_call_impl
    with evaluation_mode(model):
        assert model._compiled_call_impl is None
    assert model._compiled_call_impl is before


def test_exported_program_and_pt2_file(tmp_path: Path) -> None:
    model = mlp().eval()
    program = torch.export.export(model, (torch.zeros(3, 4),), dynamic_shapes=DYNAMIC)
    reference = Plan.trace(model, torch.zeros(3, 4))
    assert Plan.trace(program).fingerprint == reference.fingerprint
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    assert Plan.trace(path).fingerprint == reference.fingerprint
    assert Plan.trace(str(path)).fingerprint == reference.fingerprint


def test_program_exported_in_training_mode_is_refused() -> None:
    program = torch.export.export(mlp(), (torch.zeros(3, 4),), dynamic_shapes=DYNAMIC)
    with pytest.raises(TraceError, match=r"'2' runs aten\.dropout in training mode"):
        Plan.trace(program)


def test_functional_dropout_that_ignores_the_mode_is_refused() -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5)

    with pytest.raises(TraceError, match="training mode"):
        Plan.trace(Careless(), torch.zeros(2, 3))


def test_program_with_fixed_number_of_samples_is_refused() -> None:
    program = torch.export.export(mlp().eval(), (torch.zeros(3, 4),))
    with pytest.raises(TraceError, match="fixed number of samples"):
        Plan.trace(program)


def test_damaged_or_missing_pt2(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        Plan.trace(tmp_path / "missing.pt2")
    path = tmp_path / "damaged.pt2"
    path.write_bytes(b"not a zip archive")
    with pytest.raises(TraceError, match=r"damaged\.pt2"):
        Plan.trace(path)


def test_data_dependent_control_flow_says_where_and_what_to_do() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match=r"Branching.*test_trace\.py.*\.pt2"):
        Plan.trace(Branching(), torch.zeros(2, 3))


def test_all_unsupported_ops_are_listed() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.lgamma(x).cumsum(1)

    model = nn.Sequential(nn.Linear(3, 3), Odd())
    with pytest.raises(UnsupportedOpError) as raised:
        Plan.trace(model, torch.zeros(2, 3))
    assert raised.value.ops == [("aten.lgamma", "1"), ("aten.cumsum", "1")]
    assert "@lipfast.rule('aten.lgamma')" in str(raised.value)


def test_blocks_without_gradients_are_seen_through() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.linear(x)

    assert ops(Plan.trace(Frozen(), torch.zeros(2, 3))) == ["input", "aten.linear"]


def test_integer_inputs_have_no_lipschitz_constant() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    with pytest.raises(ArgumentError, match="token ids"):
        Plan.trace(model, torch.zeros(2, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (None, "example input"),
        ((), "empty"),
        (torch.zeros(0, 4), "at least one"),
        (torch.tensor(1.0), "samples"),
        (["x"], "tensor"),
    ],
)
def test_bad_example_inputs(example: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Plan.trace(mlp(), example)  # type: ignore[arg-type]


def test_something_that_is_no_model() -> None:
    with pytest.raises(ArgumentError, match=r"nn\.Module"):
        Plan.trace(io.BytesIO(), torch.zeros(2, 4))  # type: ignore[arg-type]


def test_samples_must_stay_apart() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten()

    with pytest.raises(TraceError, match="samples must stay apart"):
        Plan.trace(Mixing(), torch.zeros(2, 3))


def test_weights_computed_from_parameters_stand_beside_the_graph() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    plan = Plan.trace(model, torch.zeros(2, 3))
    assert ops(plan) == ["input", "aten.linear"]
    assert [node.op for node in plan.computed] == ["aten._weight_norm"]
    assert plan.stored_parameters == (
        "bias",
        "parametrizations.weight.original1",
        "parametrizations.weight.original0",
    )


def test_output_that_does_not_depend_on_the_input() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, self.weight

    with pytest.raises(TraceError, match="does not depend on its input"):
        Plan.trace(Constant(), torch.zeros(2, 3))


def test_large_constants_are_refused_and_small_ones_kept() -> None:
    class Shifted(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            self.register_buffer("shift", torch.full((size,), 0.1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    plan = Plan.trace(Shifted(3), torch.zeros(2, 3))
    (constant,) = plan.constants.values()
    assert torch.equal(constant.tensor(), torch.full((3,), 0.1))
    assert plan.parameters == {}
    with pytest.raises(TraceError, match="register_buffer"):
        Plan.trace(Shifted(70000), torch.zeros(2, 70000))


def test_tied_weights_keep_all_their_names() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    plan = Plan.trace(model, torch.zeros(2, 3))
    assert plan.aliases == {"0.weight": ("2.weight",), "2.weight": ("0.weight",)}
    assert len(plan.layers) == 2


def test_traced_in_double_precision() -> None:
    plan = Plan.trace(mlp().double(), torch.zeros(2, 4, dtype=torch.float64))
    assert plan.dtype == torch.float64


@pytest.mark.parametrize("shape", [(2,), (5, 7)])
def test_samples_of_the_wrong_shape_give_the_models_own_error(shape, capfd):
    with pytest.raises(TraceError, match="cannot be evaluated on samples of shape") as caught:
        trace(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.zeros(shape))
    assert "mat1 and mat2" in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_meta_tensor_is_no_example():
    with pytest.raises(ArgumentError, match="holds no data"):
        trace(nn.Linear(3, 4), torch.zeros(2, 3, device="meta"))


def test_repeated_ops_are_listed_once():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.fft.fft(torch.fft.fft(x.cumsum(1).cumsum(1)).real).real

    with pytest.raises(UnsupportedOpError, match=r"aten.cumsum in module '\(root\)' \(2 times\)"):
        trace(Twice(), torch.zeros(2, 3))


class OfInput(nn.Module):
    """A module around a function of its input and, perhaps, one parameter."""

    def __init__(self, function, parameter=None):
        super().__init__()
        self.function = function
        self.parameter = None if parameter is None else nn.Parameter(parameter)

    def forward(self, x):
        return self.function(x) if self.parameter is None else self.function(x, self.parameter)


@pytest.mark.parametrize(
    "function",
    [lambda x: x * int(x.max()), lambda x: x if x.mean() > 0 else -x],
)
def test_control_flow_by_data_says_where_and_how_to_export(function):
    advice = r"at .*test_trace\.py:\d+\).*strict=False.*torch\.export\.save.*\.pt2"
    with pytest.raises(TraceError, match=advice):
        Plan.trace(OfInput(function), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("function", "ops"),
    [
        (lambda x: x[x > 0], ["aten.gt"]),
        (lambda x: x * x.sum().item(), ["aten.item"]),
        (lambda x: x.gather(1, x.argmax(1, keepdim=True)), ["aten.argmax", "aten.gather"]),
        (lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)), ["cond", "control flow"]),
    ],
)
def test_ops_that_depend_on_data_are_named(function, ops):
    with pytest.raises(UnsupportedOpError) as raised:
        Plan.trace(OfInput(function), torch.zeros(2, 3))
    assert all(op in str(raised.value) for op in ops)
    assert "@lipfast.rule(" in str(raised.value)


def test_ops_on_inputs_and_on_parameters_are_listed_together():
    model = OfInput(
        lambda x, w: torch.maximum(torch.lgamma(x) @ w.log_softmax(0), w.exp()[0]), torch.ones(3, 3)
    )
    with pytest.raises(UnsupportedOpError) as raised:
        Plan.trace(model, torch.zeros(2, 3))
    assert [op.split()[0] for op, _ in raised.value.ops] == [
        "aten.lgamma",
        "aten.log_softmax",
        "aten.maximum",
    ]
    assert "@lipfast.rule('aten.lgamma')" in str(raised.value)
    assert "remove_parametrizations" in str(raised.value)


def test_programs_with_integer_inputs_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).eval()
    example = (torch.zeros(2, 4, dtype=torch.long),)
    program = torch.export.export(model, example, dynamic_shapes=DYNAMIC)
    with pytest.raises(ArgumentError, match="token ids"):
        Plan.trace(program)


def test_products_with_a_computed_matrix_are_layers():
    model = OfInput(lambda x, w: x @ w.exp(), torch.zeros(3, 4))
    plan = Plan.trace(model, torch.zeros(2, 3))
    assert [layer.kind for layer in plan.layers] == ["linear"]
    bound = plan.upper(model.state_dict())
    assert bound.certified
    assert 12**0.5 <= bound.value <= 12**0.5 * (1 + 2e-6)


def test_outputs_with_several_rows_for_a_sample_are_refused():
    with pytest.raises(TraceError, match="3 rows for every sample"):
        Plan.trace(OfInput(lambda x: x.reshape(-1, 2)), torch.zeros(2, 6))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + x.shape[0],
        lambda x: x * x.shape[0],
        lambda x: x / x.shape[0],
        lambda x: x.sum(1, keepdim=True) / x.shape[0],
    ],
)
def test_the_number_of_samples_is_no_number_to_calculate_with(function) -> None:
    with pytest.raises(TraceError, match=r"aten\.(add|mul|div) .*number of samples"):
        Plan.trace(OfInput(lambda x, w: function(x), torch.ones(1)), torch.zeros(2, 3))


def test_an_exception_inside_a_rule_names_the_op_and_the_module() -> None:
    rule = RULES["aten.tanh"]
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    plan = Plan.trace(model, torch.zeros(2, 3))

    def fails(*arguments: object) -> None:
        raise IndexError("tuple index out of range")

    for part in ("bound", "evaluate", "error", "supports"):
        RULES["aten.tanh"] = dataclasses.replace(rule, **{part: fails})
        try:
            with pytest.raises(TraceError, match=r"aten.tanh in module '1'.*tuple index") as raised:
                plan = Plan.trace(model, torch.zeros(2, 3))
                plan.bounds(model.state_dict(), torch.randn(3, 3))
            assert isinstance(raised.value.__cause__, IndexError)
        finally:
            RULES["aten.tanh"] = rule


class Caches(nn.Module):
    """Keeps what it computes: in an attribute, a list, a new attribute, and buffers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(5, 5)
        self.last, self.calls, self.seen, self.named = None, 0, [], {}
        self.register_buffer("cache", None)
        self.register_buffer("unsaved", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.calls += 1
        if self.kind == "attribute":
            self.last = y
        elif self.kind == "new attribute":
            self.fresh = y
        elif self.kind == "list":
            self.seen.append(y)
        elif self.kind == "dictionary":
            self.named["y"] = y
        elif self.kind == "buffer":
            self.cache = y
        else:
            self.unsaved = y
        return y.relu()


@pytest.mark.parametrize(
    "kind", ["attribute", "new attribute", "list", "dictionary", "buffer", "unsaved buffer"]
)
def test_a_model_that_keeps_what_it_computed_is_left_as_it_was(kind: str) -> None:
    model, x = Caches(kind), torch.randn(3, 5)
    inner = nn.Sequential(model)
    for call in (
        lambda: lipfast.upper_bound(inner, x),
        lambda: lipfast.jacobian_norms(inner, x),
        lambda: lipfast.lower_bound(inner, x),
    ):
        with contextlib.suppress(TraceError):  # what is written to a buffer may not be traceable
            call()
        assert model.last is None and model.calls == 0 and not hasattr(model, "fresh")
        assert model.seen == [] and model.named == {}
        assert model.cache is None and model.unsaved is None
    assert set(model.state_dict()) == {"linear.weight", "linear.bias"}
    assert torch.equal(model(x), model.linear(x).relu())
