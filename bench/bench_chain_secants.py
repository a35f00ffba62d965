"""What secants need of small networks: the native op against the traced graph in torch."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.estimators.lower.networks import Networks, networks_of
from lipfast.estimators.plan import Plan
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.threads import one_thread

NETWORKS, POINTS, STACKED = 64, 19, 27
DIMS = (40, 256, 256, 10)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(DIMS):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


@cache
def secant_problem() -> tuple[Plan, list[dict[str, Tensor]], Tensor]:
    """Plan, tensors, points: the first of each network's is its sample, the next its direction."""
    plan = Plan.trace(network(0), torch.zeros(2, DIMS[0]))
    tensors = plan.resolve_all([network(seed).state_dict() for seed in range(NETWORKS)])
    generator = torch.Generator().manual_seed(0)
    return plan, tensors, torch.randn(NETWORKS, POINTS, DIMS[0], generator=generator).double()


def ask(networks: Networks, points: Tensor) -> None:
    networks.jacobians(points[:, 0])
    networks.kink_distances(points[:, 0], points[:, 1])
    networks.enclosures(points)


def native() -> None:
    plan, tensors, points = secant_problem()
    assert plan.piecewise_linear_chain is not None
    workers = torch.get_num_threads()
    ask(networks_of(plan, tensors, plan.piecewise_linear_chain, workers), points)


def traced() -> None:
    """The graph as the certificate takes it: some networks at a time, for the cache, one thread."""
    plan, tensors, points = secant_problem()
    with one_thread(), plain_arithmetic():
        for start in range(0, NETWORKS, STACKED):
            some = points[start : start + STACKED]
            own = tensors[start : start + STACKED]
            ask(networks_of(plan, own, None, workers=1), some)


def secant_implementations() -> Implementations:
    return {"lipfast": (native, NETWORKS), "traced graph (torch)": (traced, NETWORKS)}


@in_turn("lipfast", "traced graph (torch)")
def bench_secants(benchmark: Benchmark, turn: int, implementation: str) -> None:
    dims = "-".join(map(str, DIMS))
    case = f"Jacobian, kinks and {POINTS} enclosures of {NETWORKS} networks {dims}"
    measure(benchmark, case, implementation, secant_implementations()[implementation])
