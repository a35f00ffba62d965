"""Products of activations and attention: finite where sizes are bounded, never below."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.estimators.domain import Ball, Box, Domain
from lipfast.estimators.plan import Plan
from tests.support.explicit import NORMS, Function, check_enclosure, check_quotients, traced
from tests.support.networks import randomised

Combination = Callable[[Tensor, Tensor], Tensor]


class Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.outer(torch.relu(self.inner(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Attention(nn.Module):
    """Self-attention with two heads behind a LayerNorm, with a residual."""

    def __init__(self, mask: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        heads = self.qkv(self.norm(x)).reshape(b, n, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        return x + self.out(self.mixed(*heads).transpose(1, 2).flatten(2))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = {"causal": {"is_causal": True}, "table": {"attn_mask": torch.eye(4) - 0.5}}
        return functional.scaled_dot_product_attention(q, k, v, **masks.get(self.mask, {}))


class Split(Attention):
    """The same, heads split as slices of the last axis, softmax and products written out."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(3)).softmax(-1)
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class TorchsAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.norm, self.inner = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.inner(y, y, y, need_weights=False)[0]


BOX = Box(-1.5, 1.0)
ON_A_DOMAIN: dict[str, tuple[object, tuple[int, ...], Domain]] = {
    "square": (lambda: Function(lambda x: x * x), (3,), BOX),
    "cube": (lambda: Function(lambda x: x**3), (3,), BOX),
    "gate": (Gate, (3, 2, 2), BOX),
    "gate in a ball": (Gate, (3, 2, 2), Ball(2.0, 0.5)),
    "glu": (lambda: Function(lambda x: x[:, :2] * x[:, 2:].sigmoid()), (4,), BOX),
    "broadcast": (lambda: Function(lambda x: x * x[:, :1]), (4, 3), BOX),
    "gram": (lambda: Function(lambda x: x.transpose(1, 2) @ x), (4, 3), BOX),
    "constant matrices": (
        lambda: Function(lambda x: torch.ones(2, 4, dtype=x.dtype) @ x),
        (3, 4, 3),
        BOX,
    ),
    "deep": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Function(lambda x: x * x.flip(1))),
        (4,),
        BOX,
    ),
}


@pytest.mark.parametrize("name", ON_A_DOMAIN)
def test_quotients_on_a_domain_stay_below(name: str) -> None:
    make, shape, domain = ON_A_DOMAIN[name]
    torch.manual_seed(3)
    model = make().double()  # type: ignore[operator]
    plan = traced(model, shape)
    generator = torch.Generator().manual_seed(0)
    x, step = torch.randn(2, 500, *shape, dtype=torch.float64, generator=generator)
    for norm in NORMS:
        bound = plan.upper(model.state_dict(), norm=norm, domain=domain)
        assert math.isfinite(bound.value)
        assert bound.certified
        for scale in (1e-4, 0.1, 3.0):
            a, b = (domain.project(t[None])[0] for t in (2 * x, 2 * x + scale * step))
            with torch.no_grad():
                change = (model(a) - model(b)).flatten(1)
            distance = torch.linalg.vector_norm((a - b).flatten(1), norm, 1)
            quotient = torch.linalg.vector_norm(change, norm, 1) / distance
            assert float(quotient[distance > 1e-9].max()) <= bound.value * (1 + 1e-9)
    check_enclosure(plan, model, shape, 1e-12)


def test_squares_are_tight() -> None:
    plan = Plan.trace(Function(lambda x: x * x), torch.zeros(2, 3))
    for norm in NORMS:
        assert plan.upper({}, norm=norm, domain=Box(-0.5, 2)).value == pytest.approx(4.0)
    assert plan.upper({}, domain=Ball(2.0)).value == pytest.approx(4.0)


def test_without_a_bound_the_answer_is_inf_with_its_reason() -> None:
    for model in (Gate(), Function(lambda x: x * x), Function(lambda x: x @ x.transpose(1, 2))):
        shape = (3, 2, 2) if isinstance(model, Gate) else (3, 2)
        plan = Plan.trace(model, torch.zeros(2, *shape))
        bound = plan.upper(model.state_dict())
        assert bound.value == math.inf
        assert "lipfast.Box" in (bound.reason or "")


def test_a_bounded_factor_is_not_enough_but_two_are() -> None:
    both = Function(lambda x: x.tanh() * x.flip(1).sigmoid())
    assert Plan.trace(both, torch.zeros(2, 3)).upper({}).value == pytest.approx(1.25)
    one = Function(lambda x: x * x.flip(1).sigmoid())
    assert Plan.trace(one, torch.zeros(2, 3)).upper({}).value == math.inf


def test_bounds_with_a_domain_are_in_order() -> None:
    model = Gate().eval()
    x = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    result = lipfast.bounds(model, x, domain=lipfast.Box(0, 1))
    assert result.lower.certified and result.upper.certified
    assert 0 < result.lower.value <= result.upper.value < 10
    assert bool((result.lower.points >= 0).all() and (result.lower.points <= 1).all())
    square = lipfast.bounds(Function(lambda x: x * x), torch.ones(1, 1), domain=lipfast.Box(0, 1))
    assert 1.5 < square.lower.value <= square.upper.value == pytest.approx(2.0)


@pytest.mark.parametrize("kind", [Attention, Split, TorchsAttention])
def test_attention_behind_a_normalisation_is_finite_everywhere(kind: type[Attention]) -> None:
    model = randomised(kind()).double()
    plan = traced(model, (4, 6))
    bound = plan.upper(model.state_dict())
    assert math.isfinite(bound.value)
    assert bound.certified
    x = torch.randn(20, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    check_enclosure(plan, model, (4, 6), 1e-11)
    assert all("forward" not in vars(module) for module in model.modules())
    lower = plan.lower(model.state_dict(), x)
    assert lower.certified
    assert 0 < lower.value <= bound.value


@pytest.mark.parametrize("mask", ["", "causal", "table"])
def test_attention_rounding_errors_and_quotients(mask: str) -> None:
    model = randomised(Attention(mask)).double()
    plan = traced(model, (4, 6))
    check_enclosure(plan, model, (4, 6), 1e-11)
    x = torch.randn(200, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    bound = plan.upper(model.state_dict()).value
    for step in (1e-4, 0.3):
        y = x + step * x.flip(0)
        with torch.no_grad():
            change = (model(x) - model(y)).flatten(1).norm(dim=1)
        assert float((change / (x - y).flatten(1).norm(dim=1)).max()) <= bound


def test_attention_without_a_bound_is_inf() -> None:
    model = Function(lambda x: functional.scaled_dot_product_attention(x, x, x))
    plan = Plan.trace(model, torch.zeros(2, 4, 6))
    bound = plan.upper({})
    assert bound.value == math.inf
    assert "rows are bounded" in (bound.reason or "")
    assert math.isfinite(plan.upper({}, domain=Ball(1.0)).value)
    check_quotients(plan, model, (4, 6))


TABLE = torch.linspace(-1, 1, 24).reshape(3, 4, 2)


class WithTable(nn.Module):
    """A parameter (or a vector of it) times activations, in several positions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.table = kind, nn.Parameter(TABLE.clone())

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, None].expand(-1, 3, -1, -1)
        products = {
            "vector behind": lambda: rows @ self.table[0, 0],
            "vector before": lambda: self.table[0, 0] @ rows.transpose(2, 3),
            "matrix before": lambda: self.table[0] @ rows.transpose(2, 3),
            "matrices before": lambda: self.table @ x[:, None].transpose(2, 3),
        }
        return products[self.kind]()


@pytest.mark.parametrize(
    "kind", ["vector behind", "vector before", "matrix before", "matrices before"]
)
def test_products_of_parameters_and_activations(kind: str) -> None:
    model, shape = WithTable(kind).double(), (5, 2)
    plan = traced(model, shape)
    matrix = torch.autograd.functional.jacobian(model, torch.zeros(1, *shape).double())
    matrix = matrix.reshape(-1, math.prod(shape))
    for norm in NORMS:
        truth = float(torch.linalg.matrix_norm(matrix, norm))
        bound = plan.upper(model.state_dict(), norm=norm, domain=Box(-1, 1))
        assert bound.certified and truth <= bound.value <= 10 * truth
    check_enclosure(plan, model, shape, 1e-13)
    two = [{"table": TABLE.double()}, {"table": 2 * TABLE.double()}]
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).double()
    first, second = (lower.value for lower in plan.lower(two, x))
    assert second == pytest.approx(2 * first)


def test_softmax_of_the_input_itself() -> None:
    model = Function(lambda x: x.softmax(-1) @ x)
    plan = traced(model, (3, 3))
    assert plan.upper({}).value == math.inf
    assert 1 <= plan.upper({}, domain=Box(-1, 1)).value < math.inf
    check_enclosure(plan, model, (3, 3), 1e-13)


def heads(x: Tensor, count: int, scale: float = 1.0) -> Tensor:
    """(B, n, d) as (B, count, n, d): different multiples of the same rows."""
    return torch.stack([scale * x / (1 + head) for head in range(count)], 1)


SDPA = functional.scaled_dot_product_attention
CUT = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
SHARED = {
    "one value row for eight heads": (lambda x: SDPA(0 * heads(x, 8), x[:, None], x[:, None]), 1),
    "keys and values for all heads": (lambda x: SDPA(heads(x, 4), x[:, None], x[:, None]), 3),
    "queries for all heads": (lambda x: SDPA(x[:, None], heads(x, 4, 3), heads(x, 4)), 3),
    "a rounded mask for every head": (
        lambda x: SDPA(
            heads(x, 3),
            x[:, None],
            x[:, None],
            attn_mask=torch.linspace(-1, 1, 27, dtype=torch.float64).reshape(3, 3, 3),
        ),
        3,
    ),
    "a mask of truth values for all": (
        lambda x: SDPA(heads(x, 4), x[:, None], x[:, None], attn_mask=CUT),
        3,
    ),
    "grouped queries": (
        lambda x: SDPA(heads(x, 4, 2), heads(x, 2), heads(x, 2), enable_gqa=True),
        3,
    ),
    "grouped, causal, scaled": (
        lambda x: SDPA(
            heads(x, 6), heads(x, 2), heads(x, 2), is_causal=True, scale=2.0, enable_gqa=True
        ),
        3,
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_operands_that_serve_several_heads_count_for_each(name: str) -> None:
    function, rows = SHARED[name]
    model, shape = Function(function), (rows, 2)
    plan = traced(model, shape)
    bound = plan.upper({}, domain=Box(-1, 1))
    assert bound.certified and math.isfinite(bound.value)
    check_enclosure(plan, model, shape, 1e-12)
    x = 2 * torch.rand(8, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    jacobians = [
        torch.autograd.functional.jacobian(model, point[None]).reshape(-1, 2 * rows)
        for point in x - 1
    ]
    truth = max(float(torch.linalg.matrix_norm(jacobian, 2)) for jacobian in jacobians)
    assert truth * (1 - 1e-13) <= bound.value <= 20 * truth
    lower = plan.bounds({}, x - 1, domain=Box(-1, 1)).lower
    assert lower.certified and 0.9 * truth <= lower.value <= bound.value


class ThreeInputs(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_each_coefficient_of_attention_is_approached(moved: int) -> None:
    """Two keys at +-R along one axis, values alike, queries at their middle."""
    n, radius = 3, 2.0
    q = torch.zeros(1, n, 2).double()
    k = radius * torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]).double()
    v = radius * torch.tensor([[[0.0, 1.0], [0.0, -1.0]]]).double()
    if moved == 1:  # the change of K counts as often as there are queries of length R
        q[..., 0], k = radius, 0 * k
    if moved == 2:
        k = torch.tensor([[[50.0, 0.0], [-50.0, 0.0]]]).double()
        q[..., 0] = radius
    model = ThreeInputs()
    jacobian = torch.func.jacrev(model, argnums=moved)(q, k, v).reshape(2 * n, -1)
    truth = float(torch.linalg.matrix_norm(jacobian, 2))
    expected = [radius**2, radius**2 * math.sqrt(n / 2), math.sqrt(n)][moved]
    assert 0.99 * expected <= truth <= expected * (1 + 1e-12)


@pytest.mark.parametrize("bad", [(1, 0), (math.nan, 1), (0, math.inf)])
def test_bad_domains(bad: tuple[float, float]) -> None:
    with pytest.raises(lipfast.LipfastError, match="Box"):
        Box(*bad)
    with pytest.raises(lipfast.LipfastError, match="radius"):
        Ball(-1.0)
    with pytest.raises(lipfast.LipfastError, match="do not fit"):
        Box(torch.zeros(3), torch.ones(3)).middle((2,))


def _table(*shape: int) -> Tensor:
    count = math.prod(shape)
    return torch.sin(torch.arange(float(count)) + 1.0).reshape(shape)


class Weighted(nn.Module):
    """A function of a tensor and the input, the tensor kept in one of the ways there are."""

    def __init__(self, kind: str, shape: tuple[int, ...], function: Combination) -> None:
        super().__init__()
        self.kind, self.function = kind, function
        if kind == "parameter":
            self.table = nn.Parameter(_table(*shape))
        else:
            self.values = _table(*shape).tolist()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kind == "parameter"
        table = self.table if kept else torch.tensor(self.values, dtype=x.dtype)
        return self.function(table, x)


# The tensor has a dimension of one where the samples stand, or more dimensions than a sample.
WITH_A_TABLE: dict[str, tuple[tuple[int, ...], tuple[int, ...], Combination]] = {
    "(1, 3, 2) behind": ((1, 3, 2), (2, 3), lambda w, x: x @ w),
    "(1, 3, 2) behind a turned one": ((1, 1, 2), (1, 3), lambda w, x: x.mT @ w),
    "(1, 1, 3, 2) behind": ((1, 1, 3, 2), (2, 3), lambda w, x: x[:, None] @ w),
    "(1, 5, 3, 2) behind": ((1, 5, 3, 2), (2, 3), lambda w, x: x[:, None] @ w),
    "(5, 3, 2) behind": ((5, 3, 2), (2, 3), lambda w, x: x[:, None] @ w),
    "(1, 1, 1, 3, 2) behind": ((1, 1, 1, 3, 2), (2, 3), lambda w, x: x[:, None, None] @ w),
    "(1, 2, 3) in front": ((1, 2, 3), (3, 4), lambda w, x: w @ x),
    "(2, 3) in front": ((2, 3), (3, 4), lambda w, x: w @ x),
    "(1, 1, 2, 3) in front": ((1, 1, 2, 3), (3, 4), lambda w, x: w @ x[:, None]),
    "outer product": ((1, 1, 4), (3,), lambda w, x: x[..., None] @ w),
    "product": ((1, 1, 2), (3,), lambda w, x: x[..., None] * w),
    "sum": ((1, 2, 3), (3,), lambda w, x: w + x[:, None]),
    "difference": ((1, 3), (3,), lambda w, x: w - 2 * x),
    "slopes": ((1,), (3,), lambda w, x: functional.prelu(x, w)),
    "a slope": ((), (3,), lambda w, x: functional.prelu(x, w)),
}


@pytest.mark.parametrize("kind", ["parameter", "constant"])
@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_tensors_with_leading_dimensions_of_one(name: str, kind: str) -> None:
    shape, sample, function = WITH_A_TABLE[name]
    model = Weighted(kind, shape, function)
    for count, norm in ((1, 2), (4, 1), (4, math.inf)):
        x = torch.randn(count, *sample, generator=torch.Generator().manual_seed(count))
        bounds = lipfast.bounds(model, x, norm=norm)
        truth = _largest_norm(model, x, norm)
        assert bounds.lower.certified
        assert bounds.upper.certified
        assert truth * (1 - 1e-6) <= bounds.lower.value <= bounds.upper.value <= 4 * truth
        assert bounds.upper.value >= truth * (1 - 1e-12)
        found = lipfast.jacobian_norms(model, x, norm=norm).max()
        assert float(found) == pytest.approx(truth, rel=1e-5)


def _largest_norm(model: nn.Module, x: Tensor, norm: float) -> float:
    """Of the Jacobians at the samples, by float64 autograd."""
    double = copy.deepcopy(model).double()
    norms = []
    for sample in x.double():
        matrix = torch.autograd.functional.jacobian(double, sample[None])
        norms.append(float(torch.linalg.matrix_norm(matrix.reshape(-1, sample.numel()), norm)))
    return max(norms)
