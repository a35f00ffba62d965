"""The certified secant: valid at kinks, tight away from them, below the truth always."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.estimators.domain import Box
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.lower import networks, points, secants
from lipfast.estimators.lower.networks import native_chain
from lipfast.estimators.lower.secants import certified_quotient, certified_secants
from lipfast.estimators.plan import Plan
from lipfast.plan.state import stack

SMOOTH = [
    nn.Tanh(),
    nn.Sigmoid(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.ELU(1.3),
    nn.SELU(),
    nn.CELU(0.7),
    nn.Softplus(),
    nn.Softsign(),
    nn.LogSigmoid(),
    nn.Hardswish(),
]


def network(activation: nn.Module, seed: int = 0, width: int = 20) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), activation, nn.Linear(width, 3))


def data(count: int = 30, size: int = 5) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_relu_networks_away_from_kinks_lose_nothing(seed: int, norm: float) -> None:
    model = network(nn.ReLU(), seed).double()
    plan = Plan.trace(model, data().double())
    lower = plan.lower(model.state_dict(), data().double(), norm=norm)
    assert lower.certified
    assert lower.value >= lower.jacobian.value * (1 - 1e-9)
    assert lower.value <= plan.upper(model.state_dict(), norm=norm).value


@pytest.mark.parametrize("width", [16, 512])
def test_single_precision_networks_are_within_1e_6(width: int) -> None:
    model = network(nn.ReLU(), 1, width)
    plan = Plan.trace(model, data())
    lower = plan.lower(model.state_dict(), data())
    assert lower.value == pytest.approx(lower.jacobian.value, rel=1e-6)


@pytest.mark.parametrize("activation", SMOOTH, ids=lambda module: type(module).__name__)
def test_smooth_networks_lose_nothing(activation: nn.Module) -> None:
    model = network(activation).double()
    plan = Plan.trace(model, data().double())
    lower = plan.lower(model.state_dict(), data().double())
    assert lower.certified
    assert lower.value >= lower.jacobian.value * (1 - 1e-6)
    assert lower.value <= plan.upper(model.state_dict()).value


def constant_network() -> nn.Sequential:
    """relu(x + 1) - relu(x) + relu(-x) - relu(-x - 1) is 1 everywhere; autograd says 1 at 0."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
    return model


@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_autograd_lies_at_a_kink_and_the_certificate_does_not(norm: float) -> None:
    model = constant_network()
    x = torch.zeros(1, 1)
    assert torch.equal(model(torch.linspace(-3, 3, 13)[:, None]), torch.ones(13, 1))
    plan = Plan.trace(model, x)
    lower = plan.lower(model.state_dict(), x, norm=norm)
    assert lower.jacobian.value == 1.0
    assert not lower.jacobian.certified
    assert "kink" in (lower.jacobian.reason or "")
    assert lower.certified
    assert lower.value <= 1e-12


def test_never_above_the_true_constant_in_one_dimension() -> None:
    # In one dimension the constant of a ReLU network is its largest slope between two kinks.
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)).double()
        weight, bias, last = model[0].weight[:, 0], model[0].bias, model[2].weight[0]
        kinks = (-bias / weight).sort().values
        middles = torch.cat([kinks[:1] - 1, (kinks[1:] + kinks[:-1]) / 2, kinks[-1:] + 1])
        active = weight * middles[:, None] + bias > 0
        truth = float((active * weight * last).sum(1).abs().max().detach())
        x = torch.cat([middles[:, None], kinks[:, None]]).detach()
        lower = Plan.trace(model, x).lower(model.state_dict(), x)
        assert lower.value <= truth * (1 + 1e-15)


def test_never_above_dense_sampling_of_a_smooth_function() -> None:
    model = network(nn.Tanh(), 3, 6).double()
    x = 2 * data(200).double()
    lower = Plan.trace(model, x).lower(model.state_dict(), x[:20])
    # The points of the secant stay near their sample; sample the Jacobian densely around it.
    centre, reach = lower.points.mean(0), (lower.points[0] - lower.points[1]).abs().max()
    dense = (
        centre + reach * torch.rand(4000, 5, generator=torch.Generator().manual_seed(1)).double()
    )
    around = Plan.trace(model, x).lower(model.state_dict(), torch.cat([dense, centre[None]]))
    assert lower.value <= around.jacobian.value * (1 + 1e-6)


def rational_forward(state_dict: dict[str, Tensor], point: list[Fraction]) -> list[Fraction]:
    """A ReLU network in exact arithmetic."""
    values = point
    for layer in ("0", "2"):
        weight = state_dict[f"{layer}.weight"].double().tolist()
        bias = state_dict[f"{layer}.bias"].double().tolist()
        values = [
            sum((Fraction(w) * v for w, v in zip(row, values, strict=True)), Fraction(b))
            for row, b in zip(weight, bias, strict=True)
        ]
        if layer == "0":
            values = [max(value, Fraction(0)) for value in values]
    return values


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_proved_in_exact_arithmetic(seed: int, scale: float) -> None:
    model = network(nn.ReLU(), seed, 7)
    x = data(10) * scale
    lower = Plan.trace(model, x).lower(model.state_dict(), x)
    first, second = ([Fraction(v) for v in point] for point in lower.points.tolist())
    outputs = [rational_forward(model.state_dict(), point) for point in (first, second)]
    change = sum((a - b) ** 2 for a, b in zip(*outputs, strict=True))
    distance = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    assert lower.value > 0
    assert Fraction(lower.value) ** 2 * distance <= change


@pytest.mark.parametrize("seed", range(5))
def test_error_bounds_hold_in_exact_arithmetic(seed: int) -> None:
    model = network(nn.ReLU(), seed, 7)
    plan = Plan.trace(model, data())
    parameters = stack([model.state_dict()], plan.used_parameters, torch.float64)
    points = data(4).double()[None]
    outputs, errors = enclose(plan, parameters, points)
    for point, output, error in zip(points[0], outputs[0], errors[0], strict=True):
        exact = rational_forward(model.state_dict(), [Fraction(v) for v in point.tolist()])
        for value, bound, truth in zip(output.tolist(), error.tolist(), exact, strict=True):
            assert abs(Fraction(value) - truth) <= Fraction(bound)
            assert bound <= 1e-13


def test_error_bounds_cover_smooth_activations_evaluated_in_single_precision_points() -> None:
    import mpmath  # noqa: PLC0415

    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    plan = Plan.trace(model, torch.zeros(2, 2).double())
    parameters = stack([model.state_dict()], plan.used_parameters, torch.float64)
    points = data(5, 2).double()[None]
    outputs, errors = enclose(plan, parameters, points)
    with mpmath.workdps(40):
        for index in range(5):
            x = [mpmath.mpf(v) for v in points[0, index].tolist()]
            hidden = [
                mpmath.tanh(mpmath.fdot(row, x) + b)
                for row, b in zip(model[0].weight.tolist(), model[0].bias.tolist(), strict=True)
            ]
            truth = mpmath.fdot(model[2].weight[0].tolist(), hidden) + model[2].bias.item()
            assert abs(truth - float(outputs[0, index, 0])) <= float(errors[0, index, 0])


def test_many_networks_in_small_blocks_equal_one_by_one() -> None:
    state_dicts = [network(nn.ReLU(), seed).state_dict() for seed in range(6)]
    plan = Plan.trace(network(nn.ReLU()), data())
    tensors = [plan.resolve(entry) for entry in state_dicts]
    samples = data(6)
    together = certified_secants(plan, tensors, samples)
    blocks = certified_secants(plan, tensors, samples, memory=1)
    assert together.points.shape == (6, 2, 5)
    torch.testing.assert_close(together.values, blocks.values, rtol=1e-9, atol=0)


def test_the_direction_does_not_need_the_whole_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 20)).double()
    plan = Plan.trace(model, torch.zeros(2, 30, dtype=torch.float64))
    tensors = [plan.resolve(model.state_dict())] * 2
    x = torch.randn(2, 30, dtype=torch.float64)
    whole = certified_secants(plan, tensors, x)
    monkeypatch.setattr(networks, "_LARGEST_ACTIVATIONS", 1)  # one row at a time
    by_rows = certified_secants(plan, tensors, x).values
    torch.testing.assert_close(by_rows, whole.values, rtol=1e-6, atol=0)
    monkeypatch.setattr(points, "LARGEST_JACOBIAN", 0)
    products = certified_secants(plan, tensors, x).values
    assert (products <= 1.01 * whole.values).all()
    assert (products >= 0.9 * whole.values).all()


class Transposed(nn.Module):
    """``x @ W``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def tied() -> nn.Sequential:
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), layer, nn.ReLU(), layer, nn.Linear(6, 2))


PIECEWISE_LINEAR = {
    "relu": lambda: network(nn.ReLU()),
    "leaky": lambda: network(nn.LeakyReLU(0.3)),
    "relu6": lambda: network(nn.ReLU6()),
    "hardtanh": lambda: network(nn.Hardtanh(-0.3, 0.4)),
    "no bias": lambda: nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 8)),
    "tied": tied,
    "transposed": lambda: nn.Sequential(Transposed(torch.randn(5, 7)), nn.ReLU(), nn.Linear(7, 3)),
    "linear": lambda: nn.Linear(5, 2),
    "first": lambda: nn.Sequential(nn.ReLU(), nn.Linear(5, 4), nn.ReLU()),
}


def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secants, "native_chain", lambda *_: None)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_the_native_op_and_the_traced_graph_agree(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, norm: float
) -> None:
    torch.manual_seed(1)
    models = [PIECEWISE_LINEAR[name]().to(dtype) for _ in range(3)]
    plan = Plan.trace(PIECEWISE_LINEAR[name](), data())
    tensors = [plan.resolve(model.state_dict()) for model in models]
    samples = data(3)
    assert native_chain(plan, tensors, samples) is not None
    for options in ({}, {"domain": Box(-1.0, 1.0)}, {"memory": 1}):
        native = certified_secants(plan, tensors, samples, norm=norm, **options)
        with monkeypatch.context() as patched:
            traced_only(patched)
            traced = certified_secants(plan, tensors, samples, norm=norm, **options)
        assert native.values.min() > 0
        torch.testing.assert_close(native.values, traced.values, rtol=1e-8, atol=0)
    pair = native.points[0]
    value, _ = certified_quotient(plan, tensors[0], pair, norm=norm)
    assert value == pytest.approx(float(native.values[0]), rel=1e-12)


def test_both_ways_fall_back_to_errors_in_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """So deep that elementwise errors leave little of the quotient."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(24):
        layers += [nn.Linear(24, 24), nn.ReLU()]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    plan = Plan.trace(model, data(2, 24))
    tensors = [plan.resolve(model.state_dict())]
    called = []
    bound = secants.output_error_norms
    monkeypatch.setattr(
        secants, "output_error_norms", lambda *given: called.append(1) or bound(*given)
    )
    native = certified_secants(plan, tensors, data(1, 24))
    counted = len(called)
    traced_only(monkeypatch)
    traced = certified_secants(plan, tensors, data(1, 24))
    assert counted == len(called) - counted > 0
    torch.testing.assert_close(native.values, traced.values, rtol=1e-6, atol=0)


def test_large_networks_and_other_graphs_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.trace(network(nn.ReLU()), data())
    tensors = [plan.resolve(network(nn.ReLU()).state_dict())]
    assert native_chain(plan, tensors, data(1)) is not None
    float8 = {name: value.to(torch.float8_e4m3fn) for name, value in tensors[0].items()}
    assert native_chain(plan, [*tensors, float8], data(1)) is None
    smooth = Plan.trace(network(nn.Tanh()), data())
    assert native_chain(smooth, tensors, data(1)) is None
    monkeypatch.setattr(networks, "STACKED", 100)
    assert native_chain(plan, tensors, data(1)) is None


def test_weights_and_samples_of_inference_mode_and_with_gradients() -> None:
    model = network(nn.ReLU())
    plan = Plan.trace(model, data())
    expected = certified_secants(plan, [plan.resolve(model.state_dict())], data(1))
    parameters = dict(model.named_parameters())  # they ask for gradients
    with torch.inference_mode():
        inference = {name: value.clone() for name, value in parameters.items()}
        inside = certified_secants(plan, [plan.resolve(inference)], data(1).clone())
    outside = certified_secants(plan, [plan.resolve(inference)], data(1))
    asking = certified_secants(plan, [plan.resolve(parameters)], data(1).requires_grad_())
    for found in (inside, outside, asking):
        assert torch.equal(found.values, expected.values)
        assert not found.values.requires_grad


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_both_ways_are_proved_in_exact_arithmetic(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    model = network(nn.ReLU(), 2, 7)
    plan = Plan.trace(model, data())
    tensors = [plan.resolve(model.state_dict())]
    for native in (True, False):
        if not native:
            traced_only(monkeypatch)
        value, points = certified_secants(plan, tensors, data(1) * scale).of_each()[0]
        first, second = ([Fraction(entry) for entry in point] for point in points.tolist())
        outputs = [rational_forward(model.state_dict(), point) for point in (first, second)]
        change = sum((a - b) ** 2 for a, b in zip(*outputs, strict=True))
        distance = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
        assert 0 < Fraction(value) ** 2 * distance <= change


def test_bounds_from_several_threads_are_those_of_one() -> None:
    """Tracing and forward-mode derivatives are the process's: they take turns."""

    def bounds_of(seed: int) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 12), nn.LeakyReLU(), nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU()
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        found = lipfast.bounds(model, torch.randn(9, 6, generator=generator))
        return found.lower.value, found.upper.value

    expected = [bounds_of(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(bounds_of, range(12))) == expected
