"""Networks that others published: close above what interior points find, far below the product."""

from __future__ import annotations

import math
import statistics

import pytest

import lipfast
from bench.published import ECLIPSE, MNIST, NO_ACAS, RANDOM, Networks, acas, published

# The optimum over all multipliers as an interior-point solver finds it, rounded down; what must be
# proved; how far the product is above that at least.
NETWORKS = {
    RANDOM: (36.4822, 36.52, 1.18),
    ECLIPSE: (0.73725, 0.740, 1.18),
    MNIST: (24.3693, 24.45, 1.28),
}


@pytest.mark.parametrize("effort", [2, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_optimum_is_reached(name: str, effort: int) -> None:
    plan, (state_dict,) = published(name)
    optimum, most, ratio = NETWORKS[name]
    found = plan.upper(state_dict, method="quadratic", effort=effort)
    assert found.certified
    assert found.method == "quadratic constraints"
    assert optimum <= found.value <= most
    assert plan.upper(state_dict).value >= ratio * found.value


@pytest.fixture(scope="module")
def of_acas() -> Networks:
    found = acas()
    if found is None:
        pytest.skip(NO_ACAS)
    return found


def _times_below_the_product(bounds: list[lipfast.UpperBound]) -> float:
    """Geometric mean; every bound is certified."""
    logs = []
    for bound in bounds:
        assert bound.certified
        assert bound.composition is not None
        logs.append(bound.composition.total.log - bound.log_value)
    return math.exp(statistics.fmean(logs))


def test_deep_networks_are_far_below_the_product(of_acas: Networks) -> None:
    found = of_acas.plan.upper(of_acas.state_dicts, method="quadratic")
    assert _times_below_the_product(found) >= 100


@pytest.mark.parametrize(("norm", "least"), [(1, 1400), (math.inf, 700)])
def test_signs_count_in_other_norms(of_acas: Networks, norm: float, least: float) -> None:
    assert _times_below_the_product(of_acas.plan.upper(of_acas.state_dicts, norm=norm)) >= least
