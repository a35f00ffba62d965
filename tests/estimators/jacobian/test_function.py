"""Models as functions of their samples: bad input, and models left as they were found."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError, LipfastError, NonFiniteError, StateDictError, TraceError
from lipfast.estimators.jacobian.function import model_function
from lipfast.estimators.jacobian.norms import jacobian_norms
from lipfast.estimators.samples import check_samples
from tests.support.jacobian_cases import norms, perceptron, samples


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        product = torch.tanh(self.first(x.flatten(1))) * self.second(y)
        return product, {"y": self.second(y)}


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_several_inputs_and_outputs_are_joined(norm: float) -> None:
    torch.manual_seed(0)
    model, x, y = TwoInputs(), samples(5, 2, 3), samples(5, 4, seed=4)

    def both(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        product, others = model(first, second)
        return product, others["y"]

    explicit = []
    for first, second in zip(x, y, strict=True):
        blocks = torch.autograd.functional.jacobian(both, (first[None], second[None]))
        rows = [torch.cat([part.reshape(3, -1) for part in row], 1) for row in blocks]
        explicit.append(torch.linalg.matrix_norm(torch.cat(rows), norm))
    result = jacobian_norms(model, (x, y), norm=norm)
    torch.testing.assert_close(result, torch.stack(explicit), rtol=1e-5, atol=0)


class DoubleInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x.double())
        return result


class WithoutAutograd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * x


class Constant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 3)


class NoTensor(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "result"


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def not_finite() -> nn.Module:
    model = nn.Linear(6, 2)
    with torch.no_grad():
        model.weight[1, 3] = math.inf
    return model


BAD: dict[str, tuple[Callable[[], object], object, type[Exception], str]] = {
    "dtype inside": (DoubleInside, samples(3, 6), ArgumentError, "Double and Float|same dtype"),
    "embedding": (lambda: nn.Embedding(4, 3), torch.zeros(2, 3).long(), ArgumentError, "token ids"),
    "wrong shape": (lambda: nn.Linear(7, 2), samples(3, 6), ArgumentError, "cannot be evaluated"),
    "meta model": (
        lambda: nn.Linear(6, 2, device="meta"),
        samples(3, 6),
        StateDictError,
        "no data",
    ),
    "meta samples": (
        lambda: nn.Linear(6, 2),
        torch.empty(3, 6, device="meta"),
        ArgumentError,
        "hold no data",
    ),
    "lazy": (lambda: nn.LazyLinear(2), samples(3, 6), ArgumentError, "not initialised"),
    "weight": (not_finite, samples(3, 6), NonFiniteError, r"'weight'.*1 non-finite"),
    "no autograd": (WithoutAutograd, samples(3, 6), ArgumentError, "no_grad"),
    "no tensor": (NoTensor, samples(3, 6), ArgumentError, "no tensor"),
    "one of two inputs": (Pair, samples(3, 6), ArgumentError, "several inputs go in a tuple"),
    "inputs differ": (Pair, (samples(3, 6), samples(2, 6)), ArgumentError, r"\[3, 2\] samples"),
    "no inputs": (Pair, (), ArgumentError, "no inputs"),
    "second input": (
        Pair,
        (samples(1, 6), torch.full((1, 6), math.nan)),
        NonFiniteError,
        "input 1: 1 of 1",
    ),
    "sparse": (lambda: nn.Linear(6, 2), samples(3, 6).to_sparse(), ArgumentError, "dense"),
    "empty sample": (lambda: nn.Linear(6, 2), torch.ones(3, 0), ArgumentError, "no numbers"),
    "not a model": (lambda: torch.tanh, samples(3, 6), ArgumentError, "nn.Module"),
    "no such file": (lambda: "missing.pt2", samples(3, 6), TraceError, "no such file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, x, error, message = BAD[case]
    with pytest.raises(error, match=message) as raised:
        jacobian_norms(make(), x)  # type: ignore[arg-type]
    assert isinstance(raised.value, LipfastError)


@pytest.mark.parametrize("memory", [0, -1, math.nan, "1 GB", None, True])
def test_bad_memory(memory: object) -> None:
    with pytest.raises(ArgumentError, match="memory must be"):
        jacobian_norms(nn.Linear(2, 2), samples(2, 2), memory=memory)  # type: ignore[call-overload]


def test_the_sample_that_is_not_finite_is_named() -> None:
    x = samples(9, 6)
    x[4, 2] = math.nan
    with pytest.raises(NonFiniteError, match=r"1 of 9 samples.*sample 4"):
        check_samples(x, None)
    with pytest.raises(NonFiniteError, match="sample 104"):
        check_samples(x, None, first=100)


def test_constant_functions_have_norm_zero() -> None:
    assert torch.equal(jacobian_norms(Constant(), samples(2, 4)), torch.zeros(2))
    assert torch.equal(jacobian_norms(Constant(), samples(2, 80), method="lanczos"), torch.zeros(2))


def test_exported_programs(tmp_path: Path) -> None:
    model, x = perceptron(6, 9, 4).eval(), samples(5, 6)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic)
    path = tmp_path / "model.pt2"
    torch.export.save(program, path)
    truth = norms(model, x)
    for source in (program, path, str(path)):
        torch.testing.assert_close(jacobian_norms(source, x).double(), truth, rtol=1e-5, atol=0)


def test_programs_exported_in_training_mode_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    program = torch.export.export(model, (samples(5, 6),), strict=False)
    path = tmp_path / "training.pt2"
    torch.export.save(program, path)
    with pytest.raises(TraceError, match="training mode"):
        jacobian_norms(path, samples(5, 6))


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("norm", [2, math.inf])
def test_models_are_left_as_they_were_found(norm: float, fails: bool) -> None:
    seen: list[bool] = []

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if fails and len(seen) > 1:  # each evaluation finds the buffer as it was
                raise RuntimeError("deliberate")
            return x

    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), Writing())
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[2].register_forward_hook(lambda *_: seen.append(model[2].training))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    generator = torch.get_rng_state()
    if fails:
        with pytest.raises(Exception, match="deliberate"):
            jacobian_norms(model, samples(5, 6), norm=norm)
    else:
        jacobian_norms(model, samples(5, 6), norm=norm)
    assert not any(seen)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert len(model[2]._forward_hooks) == 1


def test_autocast_and_half_precision_are_computed_in_single() -> None:
    model, x = perceptron(6, 9, 4), samples(5, 6)
    expected, rows = jacobian_norms(model, x), jacobian_norms(model, x, method="rows")
    with torch.autocast("cpu"):
        assert torch.equal(jacobian_norms(model, x), expected)
        assert torch.equal(jacobian_norms(model, x, method="rows"), rows)
    half = perceptron(6, 9, 4).bfloat16()
    result = jacobian_norms(half, x.bfloat16())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0)


def test_parameters_get_no_gradients() -> None:
    model, x = perceptron(6, 9, 4), samples(5, 6)
    with model_function(model, (x,)) as problem:
        result = problem.function(problem.x)
    assert not result.requires_grad
    assert problem.outputs == 4


def scaled_in_place(x: Tensor) -> Tensor:
    return x.mul_(3.0)


def summed(model: nn.Module) -> nn.Module:
    total = nn.Linear(5, 1, bias=False)
    nn.init.ones_(total.weight)
    return nn.Sequential(model, total, nn.Flatten(0))


class InPlace(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


WRITES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 5)),
    "hardtanh": lambda: nn.Sequential(nn.Hardtanh(inplace=True), nn.Linear(5, 5)),
    "scaled": lambda: InPlace(scaled_in_place),
}
ENTRIES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "upper_bound": lipfast.upper_bound,
    "lower_bound": lipfast.lower_bound,
    "searched": lambda m, x: lipfast.lower_bound(m, x, search="pairs"),
    "bounds": lipfast.bounds,
    "jacobian_norms": lipfast.jacobian_norms,
    "of rows": lambda m, x: lipfast.jacobian_norms(m, x, norm=1),
    "input_gradient_norms": lambda m, x: lipfast.input_gradient_norms(
        lambda y: m(y).square().sum(-1), x
    ),
    "gradients of a module": lambda m, x: lipfast.input_gradient_norms(summed(m), x),
    "compile": lipfast.compile,
}


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("entry", ENTRIES)
def test_models_that_write_into_their_input(kind: str, entry: str) -> None:
    """The samples stay as they are, and the results are those of the same model without it."""
    torch.manual_seed(0)
    x = torch.randn(3, 5)
    model, before = WRITES[kind](), x.clone()
    found = ENTRIES[entry](model, x)
    assert torch.equal(x, before)
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.Hardtanh)):
            module.inplace = False
    if kind == "scaled":
        model = InPlace(lambda y: y * 3.0)
    expected = ENTRIES[entry](model, x)
    if isinstance(found, Tensor):
        assert torch.allclose(found, expected)
    elif isinstance(found, lipfast.Bounds):
        assert found.lower.value == expected.lower.value
        assert found.upper.value == expected.upper.value
        assert found.lower.certified and found.upper.certified
    elif not isinstance(found, lipfast.Plan):
        assert found.value == expected.value
