"""Weights that a model computes from its parameters: never below, errors enclosed, many kinds."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipfast
from lipfast.errors import NonFiniteError, StateDictError, TraceError, UnsupportedOpError
from lipfast.estimators.plan import Plan
from lipfast.graph.nodes import Node, Reference, error_name
from lipfast.plan.computed import evaluate_computed
from tests.support.explicit import NORMS, check_enclosure, traced


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Positive(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x) / (1.0 + torch.exp(-x).mean())


def parametrised(rule: nn.Module) -> nn.Module:
    layer = nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", rule)
    return layer


def tall_orthogonal(kind: str) -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(5, 3), orthogonal_map=kind)


LAYERS = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 3)), (5,)),
    "weight norm, whole": (lambda: parametrizations.weight_norm(nn.Linear(5, 3), dim=None), (5,)),
    "weight norm, columns": (lambda: parametrizations.weight_norm(nn.Linear(5, 3), dim=1), (5,)),
    "weight norm of a kernel": (
        lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3, padding=1)),
        (2, 4, 4),
    ),
    "weight norm, transposed": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(2, 3, 3), dim=1),
        (2, 5),
    ),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(5, 3)), (5,)),
    "spectral norm of a kernel": (
        lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 3)),
        (2, 4, 4),
    ),
    "spectral norm by hooks": (lambda: nn.utils.spectral_norm(nn.Linear(5, 3)), (5,)),
    "orthogonal": (lambda: tall_orthogonal("householder"), (5,)),
    "orthogonal, exponential": (lambda: tall_orthogonal("matrix_exp"), (5,)),
    "orthogonal, Cayley": (lambda: tall_orthogonal("cayley"), (5,)),
    "symmetric": (lambda: parametrised(Symmetric()), (4,)),
    "positive": (lambda: parametrised(Positive()), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bounds_of_the_effective_weight(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(3)
    model = nn.Sequential(make()).double().eval()  # type: ignore[operator]
    plan = traced(model, shape)
    assert [layer.name for layer in plan.layers] == ["0"]
    size = math.prod(shape)
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    with torch.no_grad():
        matrix = (model(unit) - model(torch.zeros_like(unit))).reshape(size, -1).T
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        bound = plan.upper(model.state_dict(), norm=norm)
        assert bound.certified
        loose = 2.0 if len(shape) > 1 and norm == 2 else 1.0  # a supremum over sizes
        assert truth * (1 - 1e-13) <= bound.value <= truth * loose * (1 + 2e-6)
        lower = plan.lower(model.state_dict(), x, norm=norm)
        assert lower.certified
        assert truth * (1 - 1e-6) <= lower.value <= bound.value
    check_enclosure(plan, model, shape, 1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_errors_enclose_the_computation_in_higher_precision(name: str) -> None:
    """float32 parameters, computed in float64: the module's own float64 result is within 2 e."""
    make, shape = LAYERS[name]
    torch.manual_seed(4)
    model = make().eval()  # type: ignore[operator]
    plan = Plan.trace(model, torch.zeros(2, *shape))
    (layer,) = plan.layers
    tensors = plan.resolve(model.state_dict())
    weight, error = tensors[layer.parameter], tensors[error_name(layer.parameter)]
    with torch.no_grad():
        model.double()(torch.zeros(1, *shape, dtype=torch.float64))  # hooks compute the weight here
        off = (model.weight - weight).abs()
    assert error.shape == weight.shape
    assert bool((off <= 2 * error + 1e-300).all())
    assert (0 if name == "symmetric" else 1e-30) <= float(error.max()) < 1e-11


def test_a_wrong_error_bound_would_be_seen() -> None:
    """What rounding leaves between float64 and exact rational arithmetic is inside the bound."""
    generator = torch.Generator().manual_seed(0)
    v, g = torch.randn(6, 7, generator=generator), torch.randn(6, 1, generator=generator)
    operands = (Reference("parameter", "v"), Reference("parameter", "g"), 0)
    node = Node("w", "aten._weight_norm", operands, (), (6, 7))
    found = evaluate_computed([node], {"v": v, "g": g}, {})
    weight, error = found["computed:w"], found[error_name("computed:w")]
    import mpmath  # noqa: PLC0415

    with mpmath.workdps(50):
        for row in range(6):
            entries = [mpmath.mpf(float(entry)) for entry in v[row]]
            length = mpmath.sqrt(sum(entry**2 for entry in entries))
            for column, entry in enumerate(entries):
                truth = mpmath.mpf(float(g[row, 0])) * entry / length
                off = abs(truth - mpmath.mpf(float(weight[row, column])))
                assert off <= mpmath.mpf(float(error[row, column]))
    assert float(error.max()) < 1e-14


def test_plans_with_computed_weights_are_saved_and_tracked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3)), nn.ReLU()).eval()
    plan = Plan.trace(model, torch.zeros(2, 5))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan and again.fingerprint == plan.fingerprint
    assert "_weight_norm" in repr(plan)
    state = model.state_dict()
    first = plan.upper(state)
    tracker = again.tracker()
    assert tracker.upper(state).value == first.value
    assert set(tracker.vectors) == {plan.layers[0].parameter}
    bounds = lipfast.bounds(model, torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    assert 0 < bounds.lower.value <= bounds.upper.value
    state["0.parametrizations.weight.original1"][0] = 0.0
    with pytest.raises(NonFiniteError, match=r"module '0.*not finite"):
        plan.upper(state)
    del state["0.parametrizations.weight.original0"]
    with pytest.raises(StateDictError, match="original0"):
        plan.upper(state)


def test_weight_norm_counts_in_a_network_with_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(2, 3, 3)), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()
    ).eval()
    plan = Plan.trace(model, torch.zeros(2, 2, 5, 5))
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), *list(model)[1:]).eval()
    with torch.no_grad():
        plain[0].weight.copy_(model[0].weight)
        plain[0].bias.copy_(model[0].bias)
    expected = Plan.trace(plain, torch.zeros(2, 2, 5, 5)).upper(plain.state_dict())
    found = plan.upper(model.state_dict())
    assert found.certified
    assert found.value == pytest.approx(expected.value, rel=1e-2)


class Token(nn.Module):
    """A class token, positions, a large buffer that is not stored, and a table of indices."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (25,)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        bias = self.table[self.index].view(5, 5, 2).permute(2, 0, 1)[0]
        zeros = x.new_zeros(x.shape[0], 1, 6)
        weights = bias @ torch.cat([x[:, 1:], zeros], 1)
        return self.head(weights[:, 0])


def test_class_tokens_tables_and_zeros_per_sample(tmp_path: Path) -> None:
    model = Token().double().eval()
    plan = traced(model, (4, 6))
    bound = plan.upper(model.state_dict())
    assert bound.certified and math.isfinite(bound.value)
    check_enclosure(plan, model, (4, 6), 1e-12)
    x = torch.randn(6, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lower = plan.lower(model.state_dict(), x)
    assert lower.certified and 0 < lower.value <= bound.value
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").upper(model.state_dict()).value == bound.value
    single = Token().eval()
    assert lipfast.bounds(single, x.float()).upper.certified


class Windows(nn.Module):
    """Attention in shifted windows: samples and windows share the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-1, -1), (1, 2))
        y = y.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(y.shape[0], 4, 3, 2, 3).permute(2, 0, 3, 1, 4)
        scores = (q * 3**-0.5) @ k.transpose(-2, -1) + self.table
        mask = x.new_zeros(h // 2 * (w // 2), 4, 4)
        mask[:, 0, 1] = -100.0
        scores = scores.view(b, -1, 2, 4, 4) + mask.unsqueeze(1)
        y = (scores.view(-1, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c)
        y = self.out(y).view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return x + torch.roll(y.reshape(b, h, w, c), (1, 1), (1, 2))


def test_attention_in_windows_is_finite_and_never_below() -> None:
    model = Windows().double().eval()
    plan = traced(model, (4, 4, 6))
    assert "lipfast.weighted_rows" in [node.op for node in plan.graph.nodes]
    bound = plan.upper(model.state_dict())
    assert bound.certified and math.isfinite(bound.value)
    check_enclosure(plan, model, (4, 4, 6), 1e-11)
    x = torch.randn(40, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for scale in (1e-3, 0.1, 1.0):
        for step in (1e-4, 0.3):
            a, b = scale * x, scale * (x + step * x.flip(0))
            with torch.no_grad():
                change = (model(a) - model(b)).flatten(1).norm(dim=1)
            quotient = change / (a - b).flatten(1).norm(dim=1)
            assert float(quotient.max()) <= bound.value
    lower = plan.lower(model.state_dict(), 1e-3 * x[:3])
    assert lower.certified and 1 < lower.value <= bound.value


def test_parts_of_samples_that_may_mix_are_refused() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(-1, 2).roll(1, 0).reshape(x.shape)

    with pytest.raises((UnsupportedOpError, TraceError), match=r"samples"):
        Plan.trace(Mixing(), torch.zeros(2, 4))


def test_ops_on_parameters_that_are_not_known_are_all_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ torch.lgamma(self.weight) + torch.erfinv(self.weight)[0]

    with pytest.raises(UnsupportedOpError, match="remove_parametrizations") as raised:
        Plan.trace(Odd(), torch.zeros(2, 3))
    assert len(raised.value.ops) == 2


class Rectified(nn.Module):
    def __init__(self, beta: float, threshold: float) -> None:
        super().__init__()
        self.beta, self.threshold = beta, threshold

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x, self.beta, self.threshold)


def rectified(weight: float, beta: float, threshold: float) -> nn.Module:
    layer = nn.Linear(1, 1).double()
    layer.weight.data.fill_(weight)
    torch.nn.utils.parametrize.register_parametrization(
        layer, "weight", Rectified(beta, threshold), unsafe=True
    )
    return layer.eval()


@pytest.mark.parametrize(
    ("weight", "beta", "threshold"),
    [
        *[(-5.0, 1.0, -100.0), (-5.0, 1.0, -1.0), (1.0, 1.0, 0.5), (0.0, 1.0, -10.0)],
        *[(19.0, 1.0, 20.0), (20.0, 1.0, 20.0), (21.0, 1.0, 20.0), (-3.0, -2.0, 5.0)],
    ],
)
def test_a_softplus_of_a_weight_is_torchs(weight: float, beta: float, threshold: float) -> None:
    layer = rectified(weight, beta, threshold)
    exact = mpmath.mpf(weight) * beta
    smooth = mpmath.log1p(mpmath.exp(exact)) / beta
    truth = abs(mpmath.mpf(weight) if exact > threshold else smooth)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    found = lipfast.bounds(layer, x)
    assert found.lower.certified and found.upper.certified
    assert mpmath.mpf(found.lower.value) <= truth <= mpmath.mpf(found.upper.value)
    assert found.lower.value >= 0.999 * float(truth)


def test_a_weight_at_the_threshold_of_softplus_is_refused_where_rounding_decides() -> None:
    layer = rectified(0.1, 3.0, 3 * 0.1)
    with pytest.raises(NonFiniteError, match="softplus"):
        lipfast.upper_bound(layer, torch.zeros(1, 1).double())


class OfTensors(nn.Module):
    """A function of the input and of tensors: parameters, buffers, buffers that are not stored."""

    def __init__(self, function: Any, **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            if name.startswith("constant"):
                self.register_buffer(name, value, persistent=False)
            elif value.is_floating_point():
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(self, x)
        return result


def norms_of_the_jacobian(model: nn.Module, x: Tensor) -> dict[float, float]:
    """Of a map that is affine, in float64."""
    jacobian = torch.autograd.functional.jacobian(model, x[:1].double())
    matrix = jacobian.reshape(jacobian.shape[1:].numel() // x[0].numel(), -1)
    return {norm: float(torch.linalg.matrix_norm(matrix, norm)) for norm in NORMS}


A3 = torch.tensor([[2.0, -1.0, 0.5], [0.25, 3.0, 1.0], [-1.5, 0.75, 4.0]])
B3 = torch.tensor([[0.3, 1.1, -2.0], [1.7, -0.4, 0.9], [0.2, 0.6, -1.3]])
EFFECTIVE = {
    "mixed": lambda s, x: nn.functional.linear(x, s.g * s.a + (1 - s.g) * s.b),
    "rsub with alpha": lambda s, x: x @ torch.rsub(s.a, s.b, alpha=2.5),
    "one minus x": lambda s, x: 1 - x @ s.a,
    "inner": lambda s, x: nn.functional.linear(x, torch.inner(s.a, s.b)),
    "solve from the right": lambda s, x: x @ torch.linalg.solve(s.a, s.b, left=False),
    "by a constant's root": lambda s, x: (x @ s.a) * s.constant.sqrt(),
    "over a constant's root": lambda s, x: (x @ s.a) / torch.sqrt(s.constant),
    "over a parameter": lambda s, x: (x @ s.a) / s.b[0].exp(),
    "columns of norm 1": lambda s, x: x @ (s.a / s.a.norm(1, 0)),
    "rows chosen by integers": lambda s, x: x @ s.a[(s.index + 1) % 3],
    "beside numbers": lambda s, x: torch.cat([x @ s.a, (s.b[:1] / 3).expand(x.shape[0], -1)], 1),
    "normalised": lambda s, x: nn.functional.linear(x, nn.functional.normalize(s.a)),
    "clipped": lambda s, x: nn.functional.linear(x, s.a.clip(-0.9, 0.9)),
    "at most 1": lambda s, x: x @ (s.a / s.a.norm(dim=1, keepdim=True).clamp_min(1.0)),
    "standardised": lambda s, x: x @ ((s.a - s.a.mean(1, True)) / (s.a.std(1, keepdim=True) + 0.1)),
    "by the root of a variance": lambda s, x: x @ (s.a * torch.rsqrt(s.a.var(1, False) + 0.1)),
    "averages": lambda s, x: nn.functional.linear(x, s.a.softmax(-1)),
    "over the largest": lambda s, x: x @ (s.a / s.a.abs().max(1, keepdim=True).values),
    "chosen": lambda s, x: x @ torch.where(s.index > 0, s.a.exp(), s.b),
    "hidden": lambda s, x: x @ s.a.exp().masked_fill(s.index > 1, -2.0),
    "hidden by a sum": lambda s, x: x @ s.a.exp().masked_fill(s.index > 1, s.b.exp()[0, 0]),
    "chosen or a number": lambda s, x: x @ torch.where(s.index > 0, s.a.exp(), -7.0),
    "padded": lambda s, x: x @ nn.functional.pad(s.a.exp(), (0, 2), value=7.0),
    "over the variance of all": lambda s, x: x @ (s.a / s.a.var(unbiased=False)),
    "over the deviation of a vector": lambda s, x: x @ (s.a / s.b[0].std(False)),
    "looked up": lambda s, x: x @ nn.functional.embedding(s.index, s.a.exp()),
    "slopes": lambda s, x: nn.functional.prelu(x.abs() * -1.0, s.b.exp()[0]) + x,
    "a grid": lambda s, x: (x + torch.linspace(-1, 1, 3)) @ s.a,
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_the_effective_map_is_bounded_from_both_sides(name: str) -> None:
    model = OfTensors(
        EFFECTIVE[name],
        a=A3.clone(),
        b=B3.clone(),
        g=torch.tensor(0.3),
        index=torch.tensor([0, 2, 1]),
        constant=torch.tensor(5.0),
    )
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plan = Plan.trace(model, x)
    bounds = {norm: plan.bounds(model.state_dict(), x, norm=norm) for norm in NORMS}
    truths = norms_of_the_jacobian(model.double(), x)
    for norm, found in bounds.items():
        assert found.upper.certified and found.lower.certified
        assert truths[norm] * (1 - 1e-13) <= found.upper.value <= 1.5 * truths[norm]
        assert found.lower.value <= truths[norm] * (1 + 1e-13)
        assert found.lower.value >= 0.2 * truths[norm]
    check_enclosure(plan, model, (3,), 1e-11)


def test_what_is_filled_in_keeps_its_error() -> None:
    """A tensor that was rounded has one, a number has none."""
    third = Node("third", "aten.div", (Reference("parameter", "one"), 3.0), (), ())
    one, mask = torch.ones(()), torch.tensor([True, False])
    for fill, has_error in ((Reference("node", "third"), True), (0.5, False)):
        operands = (Reference("node", "third"), Reference("parameter", "mask"), fill)
        filled = Node("filled", "aten.masked_fill", operands, (), (2,))
        found = evaluate_computed([third, filled], {"one": one, "mask": mask}, {})
        error = found[error_name("computed:filled")]
        assert (error > 0).tolist() == [has_error, True]


def test_several_rounded_weights_are_bounded_from_both_sides() -> None:
    model = OfTensors(
        lambda s, x: x[:, None, None] @ torch.stack([s.a.exp(), s.b.sin()]), a=A3, b=B3
    )
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    plan = Plan.trace(model, x)
    found = plan.bounds(model.state_dict(), x)
    truth = norms_of_the_jacobian(model.double(), x)[2]
    assert found.lower.certified
    assert truth * (1 - 1e-6) <= found.lower.value <= truth * (1 + 1e-13)
    assert truth <= found.upper.value <= 3 * truth
    check_enclosure(plan, model, (3,), 1e-11)


def test_constants_are_folded_only_where_nothing_is_rounded() -> None:
    """sqrt(3) in float32 is below the root; a mask and a table of indices stay constants."""
    root = OfTensors(lambda s, x: x * s.constant.sqrt(), constant=torch.tensor(3.0))
    x = torch.zeros(2, 3)
    plan = Plan.trace(root, x)
    assert [node.op for node in plan.computed] == ["aten.sqrt"]
    for norm in NORMS:
        upper = plan.upper({}, norm=norm)
        assert upper.certified
        assert Fraction(upper.value) ** 2 >= 3
        assert upper.value <= math.sqrt(3.0) * (1 + 1e-15)
    exact = OfTensors(
        lambda s, x: x[:, torch.arange(2) + 1] * (1.0 - s.constant) * 0.5, constant=torch.zeros(2)
    )
    plan = Plan.trace(exact, x)
    assert not plan.computed
    assert 0.5 <= plan.upper({}).value <= 0.5 * (1 + 1e-15)


def test_numbers_of_the_code_are_exact() -> None:
    """0.1 as float64, whatever the dtype of the model."""
    model = OfTensors(lambda s, x: x * torch.full((3,), 0.1))
    assert Plan.trace(model, torch.zeros(2, 3)).upper({}).value >= 0.1


INTEGERS = {
    "truth values": torch.tensor([True, False, True]),
    "integers": torch.tensor([3, -4, 1]),
}
USES = {
    "factor": lambda x, b: x * b,
    "summand": lambda x, b: x + b,
    "minuend": lambda x, b: b.int() - x,
    "divisor": lambda x, b: x / (b + 7),
    "cast": lambda x, b: x * b.to(x.dtype),
    "weight": lambda x, b: x @ torch.outer(b, b).to(x.dtype),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize(
    ("use", "stored"),
    # A product with a matrix that is not stored has no rule.
    [(use, stored) for use in USES for stored in (True, False) if stored or use != "weight"],
)
def test_integers_and_truth_values_are_exact_numbers(kind: str, use: str, stored: bool) -> None:
    name = "table" if stored else "constant"
    model = OfTensors(lambda s, x: USES[use](x, getattr(s, name)), **{name: INTEGERS[kind].clone()})
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = {norm: lipfast.bounds(model, x, norm=norm) for norm in NORMS}
    for norm, truth in norms_of_the_jacobian(model, x).items():
        assert found[norm].upper.certified and found[norm].lower.certified
        assert truth * (1 - 1e-13) <= found[norm].upper.value <= truth * (1 + 2e-6)
        assert truth * (1 - 1e-6) <= found[norm].lower.value <= truth * (1 + 1e-13)


def test_weights_of_layers_are_floating() -> None:
    layer = nn.Linear(3, 3)
    plan = Plan.trace(layer, torch.zeros(2, 3))
    with pytest.raises(StateDictError, match="expected a floating dtype"):
        plan.upper({name: value.int() for name, value in layer.state_dict().items()})


def test_orthogonal_kernels_are_batches_of_reflections() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.orthogonal(nn.Conv1d(2, 4, 1)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    plan = traced(model, (2, 5))
    bound = plan.upper(model.state_dict())
    truth = float(torch.linalg.matrix_norm(model[0].weight[:, :, 0].detach().double(), 2))
    assert bound.certified and truth * (1 - 1e-13) <= bound.value <= truth * (1 + 1e-5)
    check_enclosure(plan, model, (2, 5), 1e-11)
