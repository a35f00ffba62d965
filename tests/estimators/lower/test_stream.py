"""Lower bounds from streams of samples, and from searches beyond them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.calls import lower_bound, upper_bound
from lipfast.estimators.domain import Ball, Box
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import LowerBound
from tests.support.jacobian_cases import norms, perceptron, samples

SEARCHES: dict[str, dict[str, object]] = {
    "convex": {"draws": 200},
    "neighbourhood": {"radius": 0.3, "draws": 5},
    "ascent": {"steps": 15, "starts": 3},
    "pairs": {"limit": 60},
}


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return perceptron(4, 12, 3, activation="tanh")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return samples(100, 4)


class Numbers(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": torch.ones(4)}


class Stream(IterableDataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.x


def same(first: LowerBound, second: LowerBound) -> bool:
    return first == second and torch.equal(first.points, second.points)


def test_tensors_datasets_and_loaders_agree(model: nn.Module, x: Tensor) -> None:
    expected = lower_bound(model, x)
    plan = Plan.trace(model, x[:2])
    assert same(plan.lower(model.state_dict(), x), expected)
    labels = torch.zeros(100)
    for data in (
        TensorDataset(x, labels),
        TensorDataset(x),
        Stream(x),
        DataLoader(TensorDataset(x, labels), batch_size=7),
        DataLoader(x, batch_size=64),
    ):
        found = lower_bound(model, data)
        assert found.sample == expected.sample
        assert found.samples == 100
        assert found.value == pytest.approx(expected.value, rel=1e-6)
        assert (found.mean, found.rms) == pytest.approx((expected.mean, expected.rms), rel=1e-6)
        assert found.certified


def test_statistics(model: nn.Module, x: Tensor) -> None:
    found = lower_bound(model, DataLoader(x, batch_size=9), per_sample=True)
    truth = norms(model, x)
    assert found.per_sample is not None
    torch.testing.assert_close(found.per_sample.double(), truth, rtol=1e-5, atol=0)
    assert found.sample == int(truth.argmax())
    assert found.mean == pytest.approx(float(truth.mean()), rel=1e-6)
    assert found.rms == pytest.approx(float(truth.square().mean().sqrt()), rel=1e-6)
    assert found.search is None


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("search", SEARCHES)
def test_searches(search: str, norm: float, model: nn.Module, x: Tensor) -> None:
    data = lower_bound(model, x, norm=norm)
    found = lower_bound(model, x, norm=norm, search=search, **SEARCHES[search])
    assert found.jacobian == data.jacobian
    assert found.search is not None
    estimate, points = found.search.estimate, found.search.points
    assert (estimate.side, estimate.certified, estimate.norm) == ("lower", False, norm)
    assert estimate.method != data.jacobian.method
    assert found.value >= data.value
    assert found.certified
    assert found.value <= upper_bound(model, x[:1], norm=norm).value
    values = found.search.values
    assert values[0] == estimate.value
    assert bool((values[:-1] >= values[1:]).all())
    if search == "pairs":
        change = model(points[:, 0].float()) - model(points[:, 1].float())
        quotients = torch.linalg.vector_norm(change, norm, dim=1) / torch.linalg.vector_norm(
            points[:, 0] - points[:, 1], norm, dim=1
        )
        torch.testing.assert_close(quotients.double().detach(), values, rtol=1e-4, atol=0)
        assert found.value >= estimate.value * (1 - 1e-6)
    else:
        assert estimate.value >= data.jacobian.value
        torch.testing.assert_close(norms(model, points.float(), norm), values, rtol=1e-5, atol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_are_seeded(search: str, model: nn.Module, x: Tensor) -> None:
    generator = torch.get_rng_state()
    first, second = (
        lower_bound(model, DataLoader(x, batch_size=11), search=search, seed=5, **SEARCHES[search])
        for _ in range(2)
    )
    assert first.search is not None
    assert second.search is not None
    assert same(first, second)
    assert torch.equal(first.search.points, second.search.points)
    assert torch.equal(torch.get_rng_state(), generator)


def test_ascent_climbs_and_stays_in_its_box(model: nn.Module, x: Tensor) -> None:
    box = (float(x.min()), float(x.max()))
    found = lower_bound(model, x, search="ascent", domain=Box(*box), steps=40)
    assert found.search is not None
    assert found.search.estimate.value > 1.01 * found.jacobian.value
    assert box[0] <= float(found.search.points.min())
    assert float(found.search.points.max()) <= box[1]


def test_ascent_in_a_piecewise_linear_network(x: Tensor) -> None:
    network = perceptron(4, 30, 3, activation="relu")
    found = lower_bound(network, x[:5], search="ascent", steps=20, per_sample=True)
    assert found.search is not None
    assert found.per_sample is not None
    climbed = found.search.values / found.per_sample.sort(descending=True).values
    assert bool((climbed >= 1).all())
    assert float(climbed.max()) > 1.05


def test_neighbourhood_stays_in_its_ball(model: nn.Module, x: Tensor) -> None:
    options = {"search": "neighbourhood", "noise": "uniform", "radius": 0.2, "draws": 8}
    found = lower_bound(model, x, centres=1, **options)
    assert found.search is not None
    distances = (found.search.points - x[found.sample]).norm(dim=1)
    assert bool((distances <= 0.2 * (1 + 1e-6)).all())
    assert float(distances.max()) > 0.1


def test_pairs_against_all_pairs(model: nn.Module, x: Tensor) -> None:
    x = torch.cat([x, x[:1]])  # a pair at distance zero
    y = model.double()(x.double())
    model.float()
    quotients = torch.cdist(y, y) / torch.cdist(x.double(), x.double()).fill_diagonal_(math.inf)
    found = lower_bound(model, x, search="pairs")
    assert found.search is not None
    expected = float(quotients[torch.isfinite(quotients)].detach().max())
    assert found.search.estimate.value == pytest.approx(expected, rel=1e-9)
    alone = lower_bound(model, x[:1].expand(3, 4), search="pairs")
    assert alone.search is not None
    assert alone.search.estimate.value == 0


def test_models_without_a_certificate(x: Tensor) -> None:
    class Bessel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x) * torch.erfc(x)

    for search in ("data", "ascent"):
        found = lower_bound(Bessel(), x, search=search)
        assert not found.certified
        assert found.reason is not None
        assert "certificate" in found.reason
        best = found.jacobian.value if found.search is None else found.search.estimate.value
        assert found.value == best
        assert found.points.shape == (2, 4)


def test_several_inputs() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y

    first, second = samples(5, 3), samples(5, 3, seed=4)
    found = lower_bound(Product(), (first, second), search="convex", draws=10)
    truth = (first.square() + second.square()).sqrt().amax(1)
    assert found.jacobian.value == pytest.approx(float(truth.max()), rel=1e-6)
    assert found.reason == "the certificate needs a model with one input"
    assert found.search is not None
    assert found.search.points.shape[1:] == (6,)


def test_samples_that_overflow_single_precision_are_done_again_in_double() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.expit(x) * 0 + x.pow(5) / 5

    found = lower_bound(Power(), torch.tensor([[1.0], [1e12]]))
    assert found.jacobian.value == pytest.approx(1e48, rel=1e-5)


@pytest.mark.parametrize(
    ("search", "options", "message"),
    [
        ("magic", {}, "search must be one of"),
        ("data", {"radius": 1.0}, "no option 'radius'; it takes none"),
        ("convex", {"radius": 1.0}, "no option 'radius'; it takes draws, limit, seed"),
        ("convex", {"draws": 0}, "draws must be a positive integer"),
        ("neighbourhood", {}, "needs a radius"),
        ("neighbourhood", {"radius": -1.0}, "radius must be a positive number"),
        ("neighbourhood", {"radius": math.inf}, "radius must be a positive number"),
        ("neighbourhood", {"radius": 1.0, "noise": "salt"}, "noise must be"),
        ("neighbourhood", {"radius": 1.0, "domain": Box(0.0, 0.1)}, "lie outside"),
        ("pairs", {"domain": Ball(0.1)}, "lie outside"),
        ("convex", {"domain": (0.0, 0.1)}, r"domain must be lipfast\.Box"),
        ("convex", {"box": (0.0, 0.1)}, "no option 'box'"),
        ("convex", {"steps": 3}, r"no option 'steps'; .*lower_bound\(search='ascent'\)"),
        ("data", {"rtol": 1e-3}, "no option 'rtol'; .*option of bounds, upper_bound"),
        ("ascent", {"steps": 1.5}, "steps must be a positive integer"),
        ("ascent", {"step": 0.0}, "step must be a positive number"),
        ("ascent", {"domain": Box(-torch.ones(3), torch.ones(3))}, "do not fit"),
        ("pairs", {"limit": 1}, "at least 2"),
    ],
)
def test_bad_searches(
    search: str, options: dict[str, object], message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(ArgumentError, match=message):
        lower_bound(model, x, search=search, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Numbers(), ArgumentError, "dict with the keys pixels"),
        (DataLoader(torch.ones(0, 4)), ArgumentError, "no samples"),
        (torch.ones(0, 4), ArgumentError, "no samples"),
        (torch.tensor(1.0), ArgumentError, "first dimension"),
        ([1.0, 2.0], ArgumentError, "input 0"),
        ("data", ArgumentError, "Dataset or a DataLoader, not str"),
        (TensorDataset(torch.zeros(3, 4, dtype=torch.uint8)), ArgumentError, "torch.uint8"),
        ([torch.ones(3, 4), torch.ones(2, 4)], ArgumentError, r"\[3, 2\] samples"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bad_data(data: object, error: type[Exception], message: str, model: nn.Module) -> None:
    with pytest.raises(error, match=message):
        lower_bound(model, data)  # type: ignore[arg-type]


def test_the_sample_that_is_not_finite_is_named(model: nn.Module, x: Tensor) -> None:
    broken = x.clone()
    broken[37, 1] = math.nan
    with pytest.raises(NonFiniteError, match="the first is sample 37"):
        lower_bound(model, DataLoader(broken, batch_size=10))


DOMAINS = {"box": Box(-0.7, 0.6), "ball": Ball(0.9, 0.05)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DOMAINS)
@pytest.mark.parametrize("search", ["data", *SEARCHES])
def test_searches_stay_in_the_domain(
    search: str, kind: str, dtype: torch.dtype, model: nn.Module, x: Tensor
) -> None:
    domain = DOMAINS[kind]
    inside = domain.project(x[:40].to(dtype)[None])[0]
    network = copy.deepcopy(model).to(dtype)
    options = {**SEARCHES.get(search, {}), "search": search, "domain": domain}
    found = lower_bound(network, DataLoader(inside, batch_size=16), **options)
    assert found.certified
    assert found.value <= lipfast.bounds(network, inside, domain=domain).upper.value
    searched = inside.double()
    if found.search is not None:
        searched = found.search.points.reshape(-1, 4).double()
        assert found.search.estimate.value > 0
    # What is searched has the dtype of the model, what is certified lies in the set itself.
    for points, wide in ((searched, dtype), (found.points, torch.float64)):
        if isinstance(domain, Box):
            low, high = torch.tensor([domain.low, domain.high], dtype=wide).tolist()
            assert low <= float(points.min())
            assert float(points.max()) <= high
        else:
            assert float((points - domain.centre).norm(dim=1).max()) <= domain.radius


def test_certified_points_of_samples_outside_are_in_the_domain(model: nn.Module, x: Tensor) -> None:
    domain = Box(-0.1, 0.1)
    found = lower_bound(model, x, domain=domain)
    plan = Plan.trace(model, x[:2])
    assert same(plan.lower(model.state_dict(), x, domain=domain), found)
    assert plan.bounds(model.state_dict(), x, domain=domain).lower == found
    assert float(found.points.abs().max()) <= 0.1
    assert found.jacobian == lower_bound(model, x).jacobian


@pytest.mark.parametrize("search", ["ascent", "neighbourhood"])
@pytest.mark.parametrize("ends", ["numbers", "tensors", "infinite"])
def test_a_box_of_a_search_is_deprecated(
    search: str, ends: str, model: nn.Module, x: Tensor
) -> None:
    box: object = (float(x.min()), float(x.max()))
    if ends != "numbers":
        box = (x.amin(0), x.amax(0) if ends == "tensors" else math.inf)
    options = {**SEARCHES[search], "search": search}
    if search == "neighbourhood":
        options["radius"] = 3.0
    with pytest.warns(DeprecationWarning, match=r"domain=lipfast\.Box\(low, high\)") as warned:
        found = lower_bound(model, x, box=box, **options)
    assert warned[0].filename == __file__
    assert found.search is not None
    if ends != "infinite":
        domain = lower_bound(model, x, domain=Box(*box), **options).search  # type: ignore[misc]
        assert domain is not None
        assert torch.equal(found.search.points, domain.points)
    assert bool((found.search.points >= x.amin()).all())
    with pytest.raises(ArgumentError, match="box and domain are both given"):
        lower_bound(model, x, box=box, domain=Box(-9, 9), **options)


def test_no_box_is_no_deprecation(model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = lower_bound(model, x, search="ascent", steps=2)
        assert same(lower_bound(model, x, search="ascent", steps=2, box=None), expected)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((1.0, 0.0), "low < high"),
        (3.0, "must be \\(low, high\\)"),
        ((-torch.ones(3), torch.ones(3)), "do not fit"),
        ((0.0, 0.1), "lie outside"),
    ],
)
@pytest.mark.filterwarnings("ignore:the option box:DeprecationWarning")
def test_bad_boxes(box: object, message: str, model: nn.Module, x: Tensor) -> None:
    with pytest.raises(ArgumentError, match=message):
        lower_bound(model, x, search="ascent", box=box)


@pytest.mark.parametrize("search", ["data", "convex", "ascent"])
def test_a_domain_of_several_inputs(search: str) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * y.sum(1, keepdim=True)

    first, second = 0.1 * samples(5, 3), 0.1 * samples(5, 2, seed=4)
    for domain in (Box(-0.5, 0.5), Ball(0.7)):
        found = lower_bound(Product(), (first, second), search=search, domain=domain)
        assert not found.certified
        if found.search is not None:
            assert found.search.points.shape[1:] == (5,)
            assert bool(domain.contains(found.search.points).all())
