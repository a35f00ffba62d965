"""Altered gradients are told from kinks, curvature, saturation and rounding by quotients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.derivatives import derivative_fault
from lipfast.estimators.jacobian.function import differentiating, model_function
from tests.support.jacobian_cases import jacobians, samples


class Written(nn.Module):
    def __init__(self, forward: Callable[[Written, Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.function = forward

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -10 * gradient


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def block(model: Written, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model.first(x)
    result: Tensor = model.second(x) + y
    return result


def hooked(model: Written, x: Tensor) -> Tensor:
    y: Tensor = model.first(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.1 * gradient)
    return y


ALTERED: dict[str, Callable[[Written, Tensor], object]] = {
    "no_grad": block,
    "detached": lambda m, x: m.first(x) + m.second(x.detach()),
    "data": lambda m, x: m.first(x) + m.second(x.data),
    "detached factor": lambda m, x: m.first(x) * x[:, :1].detach(),
    "detached output": lambda m, x: {"a": m.first(x), "b": x.detach()},
    "all detached": lambda m, x: m.first(x.detach()),
    "numpy": lambda m, x: m.first(x) + torch.from_numpy(x.detach().numpy() ** 2),
    "lists": lambda m, x: m.first(x) + torch.tensor(x.tolist(), dtype=x.dtype),
    "reversal": lambda m, x: m.first(Reversed.apply(x)),
    "reversed part": lambda m, x: torch.cat([m.first(x), m.second(0.1 * Reversed.apply(x))], 1),
    "straight through": lambda m, x: m.second(StraightThrough.apply(m.first(x) - 1)),
    "rounded": lambda m, x: x + (x.round() - x).detach(),
    "finely rounded": lambda m, x: x + ((1e3 * m.first(x)).round() / 1e3 - x).detach(),
    "all but 0": lambda m, x: x - x.detach(),
    "hook": hooked,
    "scaled": lambda m, x: m.first(x).detach() + 0.99 * (m.first(x) - m.first(x).detach()),
}

# What rounding does to quotients in float32 may explain these; models are checked in float64 unless
# they insist on float32.
WITHIN_FLOAT32 = ("scaled", "finely rounded", "straight through")


def fault(model: nn.Module, x: Tensor) -> str | None:
    with model_function(model, (x,)) as problem, differentiating():
        return derivative_fault(problem, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ALTERED)
def test_altered_gradients_are_seen(name: str, count: int, dtype: torch.dtype) -> None:
    x = samples(count, 3).to(dtype)
    found = fault(Written(ALTERED[name]).to(dtype), x)
    if name in WITHIN_FLOAT32 and dtype == torch.float32:
        return
    assert found is not None
    assert "difference quotients" in found


def test_roots_of_black_pixels_and_samples_without_a_value_hide_nothing() -> None:
    model = Written(lambda m, x: m.first(x.sqrt()) + m.second(x.detach().sqrt()))
    x = samples(2, 3).abs()
    x[:, 0] = 0
    assert fault(model, x) is not None
    x[0, 1] = -1  # of the first sample nothing is known
    assert fault(model, x) is not None


def test_the_fault_is_named() -> None:
    found = fault(Written(block), samples(2, 3))
    assert found is not None and "module 'first' gives no gradient" in found
    found = fault(Written(ALTERED["reversal"]), samples(2, 3))
    assert found is not None and "Reversed has its own backward" in found


def shortened(model: Written, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.second(model.first(x).relu()).float()


HONEST: dict[str, Callable[[Written, Tensor], object]] = {
    "relu": lambda m, x: m.second(m.first(x).relu()),
    "kinks at the sample": lambda m, x: m.second((x - x.detach().round()).abs()),
    "dead": lambda m, x: (m.first(x) - 100).relu(),
    "nearly dead": lambda m, x: (m.first(x) - 2).relu(),
    "constant": lambda m, x: torch.ones(len(x), 2),
    "saturated": lambda m, x: (1e4 * m.first(x)).tanh(),
    "saturated softmax": lambda m, x: (1e3 * m.first(x)).softmax(1),
    "curved": lambda m, x: (100 * x).sin(),
    "very curved": lambda m, x: (1e6 * x.double()).sin(),
    "wild": lambda m, x: (1e9 * x.double()).sin(),
    "no domain": lambda m, x: x.sqrt(),
    "asserts": lambda m, x: m.first(x) if bool((x.abs() < 200).all()) else 1 / 0,
    "large": lambda m, x: 1e30 * m.first(x),
    "small": lambda m, x: 1e-30 * m.first(x),
    "overflow": lambda m, x: (1e3 * x).exp(),
    "cancellation": lambda m, x: (m.first(x) + 1e6) - 1e6,
    "zero": lambda m, x: m.first(x) - m.first(x),
    "zero but for rounding": lambda m, x: m.first(x).softmax(1).sum(1, keepdim=True) - 1,
    "half inside": lambda m, x: m.first(x).half().to(x.dtype) + x,
    "float32 inside": lambda m, x: functional.linear(x.float(), m.first.weight.float()),
    "bfloat16 inside": shortened,
    "sorted": lambda m, x: x.sort(1).values,
    "jumps beside a slope": lambda m, x: x + (x > 0).to(x.dtype),
    "normalized": lambda m, x: functional.normalize(m.first(x), dim=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass(name: str, dtype: torch.dtype) -> None:
    for scale in (0.0, 1e-3, 1.0, 50.0):
        for seed in range(2):
            x = (scale * samples(3, 3, seed=seed)).to(dtype)
            assert fault(Written(HONEST[name]).to(dtype), x) is None


JUMPS: dict[str, Callable[[Written, Tensor], object]] = {
    "round": lambda m, x: x.round(),
    "floor": lambda m, x: m.first(x).floor(),
    "sign": lambda m, x: m.first(x).sign(),
    "integers": lambda m, x: (10 * x).long().to(x.dtype),
    "comparison": lambda m, x: (x > 0).to(x.dtype),
    "argmax": lambda m, x: functional.one_hot(m.first(x).argmax(1), 3).to(x.dtype),
    "a step inside": lambda m, x: m.second((m.first(x) > 0).to(x.dtype)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", JUMPS)
def test_functions_that_jump_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=r"Written jumps .*Lipschitz constant is infinite"):
        fault(Written(JUMPS[name]).to(dtype), samples(3, 3).to(dtype))


@pytest.mark.parametrize("depth", [1, 20])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_deep_networks_pass(activation: type[nn.Module], depth: int) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(depth) for m in (nn.Linear(20, 20), activation())]
    for x in (samples(2, 20), torch.zeros(1, 20)):
        assert fault(nn.Sequential(*layers), x) is None
        assert fault(nn.Sequential(*layers).double(), x.double()) is None


def test_public_calls_refuse_what_only_autograd_could_answer() -> None:
    x = samples(4, 3)
    model = Written(ALTERED["lists"])
    scalar = Written(lambda m, x: m.first(x).sum(1) + m.second(x.detach()).sum(1))
    calls: list[Callable[[], object]] = [
        lambda: lipfast.jacobian_norms(Written(block), x),
        lambda: lipfast.jacobian_norms(Written(block), x, method="rows"),
        lambda: lipfast.jacobian_norms(Written(block), x, method="lanczos"),
        lambda: lipfast.jacobian_norms(Written(block), x, create_graph=True),
        lambda: lipfast.jacobian_norms(Written(block), x.double().float(), norm=1),
        lambda: lipfast.jacobian_norms(model, torch.utils.data.DataLoader(x, batch_size=2)),  # type: ignore[arg-type]
        lambda: lipfast.lower_bound(model, x),
        lambda: lipfast.lower_bound(model, x, search="ascent"),
        lambda: lipfast.input_gradient_norms(scalar, x),
    ]
    for call in calls:
        with pytest.raises(
            ArgumentError, match="derivative of Written is not that of the function"
        ):
            call()


def test_what_a_plan_knows_is_the_function() -> None:
    """The graph is traced without gradients: a block in forward leaves no trace in it."""
    model, x = Written(block), samples(4, 3)
    weight = (model.first.weight + model.second.weight).detach()
    truth = float(torch.linalg.matrix_norm(weight, 2))
    lower = lipfast.lower_bound(model, x, per_sample=True)
    assert lower.certified
    assert lower.value == pytest.approx(truth, rel=1e-6)
    assert lower.per_sample is not None
    torch.testing.assert_close(lower.per_sample, torch.full((4,), truth), rtol=1e-5, atol=0)
    straight = nn.Sequential(nn.Linear(3, 4), Written(lambda m, x: StraightThrough.apply(x)))
    expected = jacobians(nn.Sequential(straight[0], nn.ReLU()), x)
    found = lipfast.jacobian_norms(straight, x)
    torch.testing.assert_close(found.double(), torch.linalg.matrix_norm(expected, 2))


def test_several_inputs_of_very_different_sizes() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.detach() * y.tanh() if self.blocked else x * y.tanh()

        blocked = False

    model, x, y = Two(), 1e-3 * samples(3, 4), 1e3 * samples(3, 4, seed=4)
    assert bool((lipfast.jacobian_norms(model, (x, y)) > 0).all())
    model.blocked = True
    with pytest.raises(ArgumentError, match="not that of the function"):
        lipfast.jacobian_norms(model, (x, y))


SATURATED: dict[str, Callable[[Written, Tensor], object]] = {
    "clamp": lambda m, x: x.clamp(-1, 1),
    "tanh": lambda m, x: m.first(x).tanh(),
    "hardtanh": lambda m, x: functional.hardtanh(m.first(x)),
    "steep": lambda m, x: torch.sigmoid(1e4 * m.first(x)),
    "softmax": lambda m, x: (100 * m.first(x)).softmax(1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SATURATED)
def test_saturated_models_do_not_jump_at_huge_inputs(name: str, dtype: torch.dtype) -> None:
    for power in (4, 10, 13, 16, 20, 30):
        x = 10.0**power * samples(3, 3)
        assert fault(Written(SATURATED[name]).to(dtype), x.to(dtype)) is None


@pytest.mark.parametrize("name", ["round", "floor", "sign", "integers"])
def test_jumps_of_models_with_large_and_small_inputs(name: str) -> None:
    for scale in (0.1, 255.0):
        with pytest.raises(ArgumentError, match="Written jumps"):
            fault(Written(JUMPS[name]).double(), (scale * samples(3, 3)).double())


WITHOUT_GRADIENTS: dict[str, Callable[[Written, Tensor], object]] = {
    "grad mode": lambda m, x: m.first(x) * (1 if torch.is_grad_enabled() else 3),
    "requires_grad": lambda m, x: m.first(x) if x.requires_grad else m.first(x).tanh(),
    "inference": lambda m, x: m.first(x) + (0 if torch.is_grad_enabled() else 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_other_values_without_gradients_are_refused(name: str, dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match="where no gradients are recorded"):
        fault(Written(WITHOUT_GRADIENTS[name]).to(dtype), samples(3, 3).to(dtype))


def test_derivatives_inside_forward_need_gradients_and_are_no_fault() -> None:
    def gradient(model: Written, x: Tensor) -> Tensor:
        return torch.autograd.grad(model.first(x).square().sum(), x, create_graph=True)[0]

    assert fault(Written(gradient), samples(3, 3)) is None


def test_short_cuts_of_inference_are_no_fault() -> None:
    """Where a mask hides, torch's transformers compute other numbers without gradients."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.encoder(x, src_key_padding_mask=x[..., 0] > 1)
            return result

    torch.manual_seed(0)
    x = samples(6, 12).reshape(6, 3, 4)
    x[:, 0, 0] = 0
    assert bool((x[..., 0] > 1).any())
    assert fault(Padded().eval(), x) is None
