"""Upper bounds by quadratic constraints: never below what is reached, never above the product."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError
from lipfast.estimators.upper.quadratic.chains import matrix_chain
from lipfast.estimators.upper.quadratic.verify import verify_certificate
from lipfast.estimators.upper.sweep import sweep_of

QUADRATIC = "quadratic constraints"


def _chain(activation: nn.Module, *, sizes: tuple[int, ...] = (6, 12, 9, 3)) -> nn.Sequential:
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), activation]
    return nn.Sequential(*modules[:-1])


ACTIVATIONS = [
    nn.ReLU(),
    nn.LeakyReLU(0.3),
    nn.LeakyReLU(-0.5),
    nn.PReLU(init=0.4),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.ELU(1.5),
    nn.SELU(),
    nn.Tanh(),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.Softsign(),
    nn.Hardtanh(),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_between_jacobians_and_the_product(activation: nn.Module) -> None:
    model = _chain(activation)
    x = 3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    reached = lipfast.lower_bound(model, x)
    before = lipfast.upper_bound(model, x)
    found = lipfast.upper_bound(model, x, method="quadratic")
    assert found.certified
    assert found.method == QUADRATIC
    assert reached.value <= found.value < 0.95 * before.value
    assert math.exp(found.log_value) == pytest.approx(found.value, rel=1e-12)
    assert found.certificate is not None
    assert before.certificate is None


def test_effort_only_ever_helps() -> None:
    model = _chain(nn.ReLU())
    x = torch.zeros(1, 6)
    values = [lipfast.upper_bound(model, x, method="quadratic", effort=e).value for e in (1, 2, 3)]
    assert values[2] <= values[1] * (1 + 1e-6) <= values[0] * (1 + 2e-6)


def test_one_hidden_layer_is_as_good_as_the_largest_pattern() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    first, last = model[0].weight.detach(), model[2].weight.detach()
    masks = torch.tensor(list(product((0.0, 1.0), repeat=8)), dtype=torch.float64)
    largest = float(torch.linalg.matrix_norm((last * masks[:, None]) @ first, 2).max())
    found = lipfast.upper_bound(model, torch.zeros(1, 12).double(), method="quadratic", effort=3)
    assert largest <= found.value <= 1.1 * largest


def test_state_dicts_together_as_one_by_one() -> None:
    model = _chain(nn.GELU())
    plan = lipfast.compile(model, torch.zeros(2, 6))
    generator = torch.Generator().manual_seed(0)
    networks = [
        {name: torch.randn(t.shape, generator=generator) for name, t in model.state_dict().items()}
        for _ in range(5)
    ]
    together = plan.upper(networks, method="quadratic")
    assert [bound.value for bound in together] == [
        plan.upper(own, method="quadratic").value for own in networks
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_dtype(dtype: torch.dtype) -> None:
    model = _chain(nn.ReLU())
    plan = lipfast.compile(model, torch.zeros(2, 6))
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    wide = {name: tensor.double() for name, tensor in weights.items()}
    values = [plan.upper(own, method="quadratic").value for own in (weights, wide)]
    assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_folded_and_merged_maps_are_bounded_with_their_errors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 5, bias=False),
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 8),
        nn.LeakyReLU(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_var, 0.1, 3.0)  # type: ignore[arg-type]
            nn.init.normal_(module.weight)
    x = torch.randn(300, 2, 3)
    result = lipfast.bounds(model, x, method="quadratic")
    assert result.upper.method == QUADRATIC
    assert result.lower.value <= result.upper.value < lipfast.upper_bound(model, x).value
    plan = lipfast.compile(model, x)
    chain = matrix_chain(sweep_of(plan, plan.folded))
    assert chain is not None
    assert len(chain.layers) == 3


def test_rows_of_features_that_are_treated_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.PReLU(3), nn.Linear(8, 2), nn.Tanh(), nn.Flatten())
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.1, 0.9, -0.7]))
    x = torch.randn(200, 3, 4)
    result = lipfast.bounds(model, x, method="quadratic")
    assert result.upper.method == QUADRATIC
    assert result.lower.value <= result.upper.value
    parts = [
        lipfast.upper_bound(
            nn.Sequential(model[0], nn.LeakyReLU(slope), model[2]), x, method="quadratic", effort=3
        ).value
        for slope in (0.1, 0.9, -0.7)
    ]
    assert max(parts) <= result.upper.value * (1 + 1e-3)


class _Jumps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.threshold(x, 0.1, 20.0)


def test_what_has_no_constraints_says_so_and_keeps_the_product() -> None:
    model = _chain(_Jumps())
    found = lipfast.upper_bound(model, torch.zeros(1, 6), method="quadratic")
    before = lipfast.upper_bound(model, torch.zeros(1, 6))
    assert (found.value, found.method, found.certified) == (before.value, before.method, True)
    assert "no quadratic constraints" in str(found.reason)


@pytest.mark.parametrize("behind", [[], [nn.ReLU()], [nn.Sigmoid(), nn.Tanh()]], ids=repr)
def test_one_matrix_is_as_good_as_its_norm(behind: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 3), *behind)
    found = lipfast.upper_bound(model, torch.zeros(1, 6), method="quadratic")
    before = lipfast.upper_bound(model, torch.zeros(1, 6))
    assert before.value * (1 - 1e-5) <= found.value <= before.value


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _chain(nn.ReLU(), sizes=(6, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def test_sums_of_branches() -> None:
    model = _Residual()
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    result = lipfast.bounds(model, x, method="quadratic")
    assert result.upper.method == QUADRATIC
    assert result.lower.value <= result.upper.value < 0.95 * lipfast.upper_bound(model, x).value


def test_a_head_of_zeros_and_what_is_scored_with_it() -> None:
    model = nn.Sequential(_Residual(), nn.Linear(6, 2))
    plan = lipfast.compile(model, torch.zeros(2, 6))
    good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zero = {**good, "1.weight": torch.zeros(2, 6)}
    found = plan.upper([good, zero, good], method="quadratic")
    assert found[1].value == 0.0
    assert 0 < found[0].value == found[2].value < plan.upper(good).value
    chain = _chain(nn.ReLU())
    nn.init.zeros_(chain[-1].weight)  # type: ignore[arg-type]
    assert lipfast.upper_bound(chain, torch.zeros(1, 6), method="quadratic").value == 0.0


class _Results(nn.Module):
    """3 x and then 0.1 relu(3 x), with several of the tensors on the way as results."""

    def __init__(self, chosen: str) -> None:
        super().__init__()
        self.chosen = chosen
        self.first, self.last = (nn.Linear(1, 1, bias=False) for _ in range(2))
        nn.init.constant_(self.first.weight, 3.0)
        nn.init.constant_(self.last.weight, 0.125)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.relu(self.first(x))
        found = {"x": x, "h": hidden, "y": self.last(hidden), "v": self.first(x)}
        return tuple(found[name] for name in self.chosen)


@pytest.mark.parametrize("chosen", ["yh", "hy", "xy", "yv", "yy", "h", "hh", "yyh"])
@pytest.mark.parametrize("norm", [1, 2, math.inf])
def test_results_on_the_way_count(chosen: str, norm: float) -> None:
    sizes = [{"x": 1.0, "h": 3.0, "y": 0.375, "v": 3.0}[name] for name in chosen]
    truth = float(torch.linalg.vector_norm(torch.tensor(sizes, dtype=torch.float64), norm))
    options = {"method": "quadratic"} if norm == 2 else {}
    found = lipfast.upper_bound(_Results(chosen), torch.zeros(2, 1), norm=norm, **options)  # type: ignore[arg-type]
    assert truth * (1 - 1e-15) <= found.value <= truth * (1 + 1e-3)


def test_a_product_beyond_float64() -> None:
    model = _chain(nn.ReLU(), sizes=(3, 4, 4, 4, 4, 2))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 1e30
    found = lipfast.upper_bound(model.double(), torch.zeros(1, 3).double(), method="quadratic")
    before = lipfast.upper_bound(model, torch.zeros(1, 3).double())
    assert found.value < before.value < math.inf
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 1e40
    found = lipfast.upper_bound(model, torch.zeros(1, 3).double(), method="quadratic")
    assert found.value == math.inf
    assert found.log_value < lipfast.upper_bound(model, torch.zeros(1, 3).double()).log_value


def test_the_tracker_goes_on_from_the_multipliers_before() -> None:
    model = _chain(nn.ReLU(), sizes=(20, 40, 40, 10))
    plan = lipfast.compile(model, torch.zeros(2, 20))
    weights = model.state_dict()
    similar = {name: tensor * 1.001 for name, tensor in weights.items()}
    tracker = plan.tracker(method="quadratic", effort=1)
    assert tracker.multipliers is None
    cold = tracker.upper(weights)
    assert tracker.multipliers is not None
    assert [len(own) for own in tracker.multipliers] == [40, 40]
    warm = tracker.upper([similar, similar])
    assert warm[0].value <= cold.value * 1.001**3 * (1 + 1e-3)
    tracker.reset()
    assert tracker.multipliers is None
    assert tracker.upper(weights).value == cold.value


@pytest.mark.parametrize("effort", [1, 2])
def test_the_tracker_along_a_run(effort: int) -> None:
    """About as tight as calls without a start, also where weights jump."""
    torch.manual_seed(2)
    model = _chain(nn.ReLU(), sizes=(20, 60, 60, 10))
    plan, weights = lipfast.compile(model, torch.zeros(2, 20)), model.state_dict()
    tracker = plan.tracker(method="quadratic", effort=effort)
    lost = []
    for step in range(10):
        size = 1.0 if step == 5 else 0.02
        for name, tensor in weights.items():
            weights[name] = tensor + size * tensor.std() * torch.randn_like(tensor)
        cold = plan.upper(weights, method="quadratic", effort=1)
        lost.append(math.log(tracker.upper(weights).value / cold.value))
    assert sum(lost) / len(lost) < 0.02
    assert max(lost) < 0.11


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e25])
@pytest.mark.parametrize("of", ["all", "0.weight", "2.weight", "4.weight", "rows", "columns"])
def test_what_comes_after_a_network_that_teaches_nothing(of: str, factor: float) -> None:
    torch.manual_seed(0)
    model = _chain(nn.ReLU(), sizes=(10, 30, 30, 5))
    plan, weights = lipfast.compile(model, torch.zeros(2, 10)), model.state_dict()
    other = {name: tensor.clone() for name, tensor in weights.items()}
    if of == "rows":
        other["0.weight"][::2] *= factor
    elif of == "columns":
        other["2.weight"][:, ::2] *= factor
    else:
        for name in ("0.weight", "2.weight", "4.weight") if of == "all" else (of,):
            other[name] *= factor
    cold = plan.upper(weights, method="quadratic", effort=1).value
    tracker = plan.tracker(method="quadratic", effort=1)
    for _ in range(2):
        tracker.upper(weights)
        tracker.upper(other)
        after = tracker.upper(weights)
        assert after.method == "quadratic constraints"
        assert after.value < cold * 1.11


def test_networks_that_lose_by_their_start_are_certified_as_others() -> None:
    """One call has some from their starts and some without: each with its own certificate."""
    model = _chain(nn.ReLU(), sizes=(20, 40, 40, 10))
    plan, weights = lipfast.compile(model, torch.zeros(2, 20)), model.state_dict()
    similar = {name: tensor * 1.001 for name, tensor in weights.items()}
    tracker = plan.tracker(method="quadratic", effort=1)
    tracker.upper(weights)
    torch.manual_seed(5)
    others = [
        {name: tensor + scale * torch.randn_like(tensor) for name, tensor in similar.items()}
        for scale in (0.0, 0.2, 0.001, 0.3)
    ]
    found = tracker.upper(others)
    for own, bound in zip(others, found, strict=True):
        assert bound.certificate is not None
        proved = verify_certificate(bound.certificate, plan, own)
        assert proved.value == pytest.approx(bound.value, rel=1e-12)
        cold = plan.upper(own, method="quadratic", effort=1).value
        assert bound.value < 1.11 * cold


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sdp"}, "'product' or 'quadratic'"),
        ({"method": "quadratic", "effort": 4}, "1, 2 or 3"),
        ({"method": "quadratic", "effort": True}, "1, 2 or 3"),
        ({"method": "quadratic", "norm": 1}, "norm 2"),
    ],
)
def test_options_that_are_none(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.upper_bound(_chain(nn.ReLU()), torch.zeros(1, 6), **options)  # type: ignore[arg-type]


def test_nothing_of_the_users_is_changed() -> None:
    model = _chain(nn.GELU())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    lipfast.upper_bound(model, torch.zeros(1, 6), method="quadratic")
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
