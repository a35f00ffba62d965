"""Max pools as maxima of pairs: the same function, bounds against all choices that pools make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.estimators.upper.quadratic.graph_pools import without_max_pools
from lipfast.estimators.upper.quadratic.graph_quadratic import graph_quadratic
from lipfast.plan.checked import resolve_all
from lipfast.plan.interpret import joined_outputs, walk


class _Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


_POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], int]] = {
    "pairs": (lambda x: functional.max_pool1d(x, 2), (2, 7), 1),
    "overlapping": (lambda x: functional.max_pool1d(x, 3, 2), (1, 9), 2),
    "padded": (lambda x: functional.max_pool1d(x, 3, 2, 1), (2, 8), 2),
    "every place": (lambda x: functional.max_pool1d(x, 3, 1, 1), (1, 5), 2),
    "dilated": (lambda x: functional.max_pool1d(x, 2, 1, 1, 3), (1, 9), 1),
    "ceil": (lambda x: functional.max_pool1d(x, 3, 2, 1, 1, True), (1, 8), 2),
    "squares": (lambda x: functional.max_pool2d(x, 2), (2, 4, 5), 2),
    "rectangles": (lambda x: functional.max_pool2d(x, (3, 2), (2, 1), (1, 0)), (1, 5, 4), 3),
    "cubes": (lambda x: functional.max_pool3d(x, 2), (1, 2, 4, 2), 3),
    "adaptive": (lambda x: functional.adaptive_max_pool1d(x, 3), (2, 7), 2),
    "with indices": (
        lambda x: functional.max_pool2d(x, 2, return_indices=True)[0],
        (1, 4, 4),
        2,
    ),
    "behind a ReLU": (lambda x: functional.max_pool1d(torch.relu(x), 2), (2, 6), 1),
    "behind tanh": (lambda x: functional.max_pool2d(torch.tanh(x), 2), (1, 4, 4), 2),
    "beside its ReLU": (
        lambda x: torch.cat([functional.max_pool1d(torch.relu(x), 2), torch.relu(x)], 2),
        (2, 6),
        1,
    ),
    "behind a function that falls": (
        lambda x: functional.max_pool1d(functional.silu(x), 2),
        (1, 6),
        1,
    ),
}


@pytest.mark.parametrize("name", _POOLS)
def test_the_graph_is_the_same_function(name: str) -> None:
    function, shape, maxima = _POOLS[name]
    torch.manual_seed(0)
    x = torch.randn(16, *shape, dtype=torch.float64)
    plan = lipfast.compile(_Of(function), x[:1])
    graph = without_max_pools(plan.graph)
    assert not any("pool" in node.op for node in graph.nodes)
    assert sum(node.op == "aten.maximum" for node in graph.nodes) == maxima
    assert [node.shape for node in graph.nodes if node.name in graph.outputs] == [
        node.shape for node in plan.graph.nodes if node.name in plan.graph.outputs
    ]
    found = joined_outputs(graph, walk(graph, {}, plan.constants, [x[None]]))
    assert torch.equal(found[0], function(x).flatten(1))


def test_a_function_that_does_not_rise_stays_before_the_pool() -> None:
    function, shape, _ = _POOLS["behind a function that falls"]
    plan = lipfast.compile(_Of(function), torch.zeros(1, *shape))
    ops = [node.op for node in without_max_pools(plan.graph).nodes]
    assert ops.index("aten.silu") < ops.index("aten.maximum")


def test_pools_over_whole_channels_stay() -> None:
    plan = lipfast.compile(_Of(lambda x: functional.max_pool2d(x, 8)), torch.zeros(1, 1, 8, 8))
    assert without_max_pools(plan.graph) == plan.graph


def _bound(model: nn.Module, shape: tuple[int, ...], evaluations: int) -> float:
    plan = lipfast.compile(model.eval(), torch.zeros(1, *shape, dtype=torch.float64))
    (parameters,) = resolve_all(plan, model.state_dict())
    found = graph_quadratic(plan, parameters, evaluations=evaluations)
    assert found.reason is None
    return found.value


def _largest_choice(first: Tensor, last: Tensor, windows: list[list[int]], *, relu: bool) -> float:
    """The largest norm of last times rows of first, one for each window or none."""
    none = [-1] if relu else []
    best = 0.0
    for chosen in itertools.product(*(window + none for window in windows)):
        rows = torch.stack([first[at] if at >= 0 else torch.zeros_like(first[0]) for at in chosen])
        best = max(best, float(torch.linalg.matrix_norm(last @ rows, 2)))
    return best * (1.0 - 1e-13)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("evaluations", [0, 40])
def test_never_below_a_choice_and_near_the_largest(relu: bool, evaluations: int) -> None:
    windows = [[0, 1, 2], [2, 3, 4], [4, 5]]
    for seed in range(4):
        torch.manual_seed(seed)
        pool = nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (1, 6)))
        act = [nn.ReLU()] if relu else []
        tail = nn.MaxPool1d(3, 2, ceil_mode=True), nn.Flatten(), nn.Linear(3, 2)
        model = nn.Sequential(*pool, *act, *tail).double()
        first, last = model[0].weight.detach(), model[-1].weight.detach()
        largest = _largest_choice(first, last, windows, relu=relu)
        found = _bound(model, (4,), evaluations)
        assert largest <= found
        if evaluations:
            assert found <= 1.25 * largest


def test_a_pool_of_like_entries_has_their_norm_and_not_that_of_all() -> None:
    """As one vector it would be allowed the root of four times as much."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Unflatten(1, (1, 4)), nn.MaxPool1d(4)).double()
    weight = torch.tensor([[1.0], [1.01], [0.99], [1.0]], dtype=torch.float64)
    model[0].weight.data = weight
    assert _bound(model, (1,), 30) == pytest.approx(1.01, rel=1e-2)
    assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(2.0, rel=1e-2)


@pytest.mark.parametrize("seed", range(3))
def test_no_jacobian_of_a_small_network_is_above(seed: int) -> None:
    """Jacobians at many points, through two convolutions, pools with padding and a residual sum."""
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = functional.max_pool2d(torch.relu(self.first(x)), 3, 2, 1)
            x = x + functional.max_pool2d(self.second(x), 3, 1, 1)
            return self.last(functional.max_pool2d(x, 2, 2, 1).flatten(1)[:, :8])

    model = Net().double()
    found = _bound(model, (1, 6, 6), 20)
    best = 0.0
    for scale in (0.1, 1.0, 10.0):
        points = scale * torch.randn(20, 1, 6, 6, dtype=torch.float64)
        jacobians = torch.func.vmap(torch.func.jacrev(lambda x: model(x[None])[0]))(points)
        best = max(best, float(torch.linalg.matrix_norm(jacobians.detach().flatten(2), 2).max()))
    assert 0.0 < best * (1.0 - 1e-12) <= found < math.inf
