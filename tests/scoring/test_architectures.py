from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, LipfastError, TraceError
from lipfast.scoring.architectures import ModelFamily, parse_arguments

X = torch.zeros(5, 4)


def typed(width: int, scale: float = 1.0, *, flag: bool = True, name: str = "a") -> nn.Module:
    return nn.Linear(4, width)


def test_keywords_come_from_the_metadata_in_the_types_of_the_signature(toy_models):
    architecture = ModelFamily(toy_models, {"name": 5})
    arguments = architecture.arguments({"width": 8.0, "bias": 0, "lr": 0.1, "depth": 2})
    assert arguments == (("bias", False), ("depth", 2), ("name", "5"), ("width", 8))
    assert architecture.plan(arguments, X).parameters == {
        "0.weight": (8, 4),
        "2.weight": (8, 8),
        "4.weight": (3, 8),
    }


def test_overrides_go_before_the_metadata_and_are_parsed():
    architecture = ModelFamily(typed, {"width": "3", "flag": "false"})
    assert architecture.arguments({"width": 8, "scale": 2, "name": "b"}) == (
        ("flag", False),
        ("name", "b"),
        ("scale", 2.0),
        ("width", 3),
    )


def test_a_missing_keyword_says_what_there_is(toy_models):
    with pytest.raises(ArgumentError) as caught:
        ModelFamily(toy_models).arguments({"lr": 0.1, "depth": 2})
    for word in ("'width'", "its keys: depth, lr", "--arch-arg width=VALUE", toy_models):
        assert word in str(caught.value)


def test_a_value_of_the_wrong_type():
    with pytest.raises(ArgumentError, match="the keyword 'width' is 'wide', expected int"):
        ModelFamily(typed).arguments({"width": "wide"})
    with pytest.raises(ArgumentError, match=r"the keyword 'width' is 0\.5, expected int"):
        ModelFamily(typed).arguments({"width": 0.5})


def test_an_unknown_override():
    with pytest.raises(ArgumentError, match="no parameter 'wdith'; it has width, scale, flag"):
        ModelFamily(typed, {"wdith": 3})
    ModelFamily(lambda **anything: nn.Identity(), {"wdith": 3})


def test_plans_are_compiled_once_per_arguments():
    calls = []

    def make(width: int) -> nn.Module:
        calls.append(width)
        return nn.Linear(4, width)

    architecture = ModelFamily(make)
    first = architecture.plan((("width", 2),), X)
    assert architecture.plan((("width", 2),), X) is first
    architecture.plan((("width", 3),), X)
    assert calls == [2, 3]
    assert architecture.compiled == 2


def test_failures_are_remembered(toy_models):
    architecture = ModelFamily(toy_models.replace("mlp", "broken"))
    for _ in range(2):
        with pytest.raises(ArgumentError, match=r"broken\(width=2\) raised RuntimeError: no such"):
            architecture.plan((("width", 2),), X)
    assert architecture.compiled == 0


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("models", "expected module:function"),
        ("no_such_module:f", r"importing 'no_such_module' raised ModuleNotFoundError.* current"),
        ("lipfast_toy_models:missing", "'lipfast_toy_models' has no 'missing'"),
        ("lipfast_toy_models:TOY", "has no 'TOY'"),
        ("math:pi", "is a float, not a function"),
        ("missing.pt2", r"'missing\.pt2': no such file"),
        ("damaged.pt2", "is not what torch.export.save writes"),
        (3, "architecture 3: expected module:function"),
    ],
)
def test_what_is_no_architecture(toy_models, source, message):
    Path("damaged.pt2").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match=message):
        ModelFamily(source)


def test_what_is_no_model():
    with pytest.raises(ArgumentError, match=r"returned a int, not an nn\.Module"):
        ModelFamily(lambda: 3).plan((), X)


def test_data_of_the_wrong_shape(toy_models):
    with pytest.raises(ArgumentError, match=r"cannot be evaluated on samples of shape \(5,\)"):
        ModelFamily(toy_models).plan((("width", 2),), torch.zeros(3, 5))


def test_an_op_without_a_rule():
    class Cumulative(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cummax(dim=1).values

    with pytest.raises(LipfastError, match="cummax"):
        ModelFamily(Cumulative()).plan((), X)


class Tempered(nn.Module):
    """Reads a number or a table that its state dict does not hold."""

    def __init__(self, width: int = 8, temperature: float = 1.0, *, table: bool = False) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, width), nn.Linear(width, 3)
        value = torch.arange(width) + 1.0 if table else torch.tensor(temperature)
        self.register_buffer("factor", value, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu() * self.factor)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"temperature": 1.0}, {"temperature": 1000.0}),
        ({"width": 8, "table": True}, {"width": 16, "table": True}),
    ],
    ids=["a number", "a table as long as the layer"],
)
def test_a_plan_with_other_constants_is_not_reused(first, second):
    architecture = ModelFamily(Tempered)
    for chosen in (first, second):
        model = Tempered(**chosen).eval()
        found = architecture.plan(tuple(chosen.items()), X).upper(model.state_dict())
        assert found.value == lipfast.upper_bound(model, X).value


def test_a_module_stays_as_it_was():
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).train()
    plan = ModelFamily(model).plan((), X)
    assert plan.parameters["0.weight"] == (2, 4)
    assert model.training


def test_global_state_is_left_alone(toy_models):
    path = list(sys.path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ModelFamily(toy_models).plan((("width", 2),), X)
    assert torch.equal(torch.get_rng_state(), before)
    assert sys.path == path


def test_exported_programs(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU())
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "model.pt2")
    architecture = ModelFamily(tmp_path / "model.pt2")
    assert architecture.input_shape == (4,)
    assert architecture.arguments({"width": 3}) == ()
    assert architecture.plan((), X).parameters == {"0.weight": (2, 4), "0.bias": (2,)}
    with pytest.raises(ArgumentError, match="takes samples of shape"):
        ModelFamily(tmp_path / "model.pt2").plan((), torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match="has no parameter 'width'; it has none"):
        ModelFamily(tmp_path / "model.pt2", {"width": 3})


def test_parse_arguments():
    assert parse_arguments(["a=1", "b=x=y", "c="]) == {"a": 1, "b": "x=y", "c": ""}
    for text in ("a", "=1"):
        with pytest.raises(ArgumentError, match="expected key=value"):
            parse_arguments([text])


@pytest.mark.parametrize("how", ["toy.py:mlp", "./toy.py:mlp", "./toy:mlp"])
def test_a_file_instead_of_a_module(how):
    with pytest.raises(ArgumentError, match="name the module, not its file: 'toy:mlp'"):
        ModelFamily(how)


def test_a_function_that_exits_or_says_much_is_an_error_of_one_line():
    def leaves(width: int) -> nn.Module:
        raise SystemExit(3)

    def talks(width: int) -> nn.Module:
        raise RuntimeError("first\nsecond")

    with pytest.raises(ArgumentError, match="raised SystemExit: 3"):
        ModelFamily(leaves).model((("width", 1),))
    with pytest.raises(ArgumentError, match=r"raised RuntimeError: first$"):
        ModelFamily(talks).model((("width", 1),))


class Cached(nn.Linear):
    """Keeps the weight that it computes in eval mode."""

    cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.cache is None:
            self.cache = 2 * self.weight
        return nn.functional.linear(x, self.cache, self.bias)


def test_a_layer_that_caches_its_weight_is_compiled_from_the_weight() -> None:
    plan = ModelFamily(lambda: Cached(4, 3)).plan((), torch.zeros(2, 4))
    for scale in (1.0, 5.0):
        weights = {"weight": scale * torch.eye(3, 4), "bias": torch.zeros(3)}
        assert plan.upper(weights).value == pytest.approx(2 * scale, rel=1e-5)


def test_a_used_module_is_copied_and_its_cached_weight_refused() -> None:
    model = Cached(4, 3).eval()
    model(torch.zeros(1, 4))
    cache = model.cache
    assert cache is not None
    assert cache.grad_fn is not None
    with pytest.raises(LipfastError, match=r"weight|computed"):
        ModelFamily(model).plan((), torch.zeros(2, 4))
    assert model.cache is cache


def test_a_cached_factor_is_refused_by_name() -> None:
    class Factor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.cache = nn.Parameter(torch.ones(4)), None

        def forward(self, x: Tensor) -> Tensor:
            self.cache = (2 * self.scale).detach() if self.cache is None else self.cache
            return x * self.cache

    model = nn.Sequential(Factor()).eval()
    model(torch.zeros(1, 4))
    with pytest.raises(ArgumentError, match=r"parameter '0\.scale', but '0\.cache'"):
        ModelFamily(model).plan((), torch.zeros(2, 4))


def test_a_forward_that_writes_is_refused_by_name() -> None:
    class Initialised(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = torch.ones(3, 4)
            return super().forward(x)

    with pytest.raises(TraceError, match="writes its parameter 'weight' in forward"):
        ModelFamily(lambda: Initialised(4, 3)).plan((), torch.zeros(2, 4))
