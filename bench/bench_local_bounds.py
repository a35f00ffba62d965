"""Bounds on a ball and a box around a sample, against those everywhere and linear relaxations.

auto_LiRPA bounds Jacobians of a box by linear relaxations (Shi et al., 2022): of the activations'
operands, and of the products with slopes on the way back. Its releases that do so are not on the
package index (0.3, which is, has no Jacobians), so that the method stands here, in floating point
and with one lower line of each ReLU for all that is bounded: `linear_relaxations`. Where a release
that has it is installed, it is asked as well.
"""

from __future__ import annotations

import importlib
import math
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from bench.turns import Benchmark, in_turn, measure
from experiments.data.generated import mnist1d

DEEP = (40, *[64] * 10, 10)
WIDE = (40, 128, 128, 128, 10)
BALL, BOX = 0.1, 0.05
LEAST_GAIN = 5.0  # of the bound on the ball
MOST_ABOVE = 1.15  # of a bound on the box
STEPS, RATE = 20, 0.1  # of the relaxations' search

Range = tuple[Tensor, Tensor]


@cache
def trained(dims: tuple[int, ...]) -> tuple[nn.Sequential, Tensor]:
    """A network with ReLUs, trained as the study's are, and a sample."""
    torch.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(dims):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    model, data = nn.Sequential(*modules[:-1]), mnist1d()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = data.x_train, data.y_train.long()
    for _ in range(2000):
        chosen = torch.randint(len(x), (100,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x[chosen]), y[chosen]))
        optimizer.step()
    return model.requires_grad_(False), x[0]


def upper(dims: tuple[int, ...], norm: float, domain: lipfast.Box | lipfast.Ball | None) -> float:
    model, x = trained(dims)
    effort = 1 if norm == math.inf else 2
    bound = lipfast.upper_bound(
        model, x[None], norm=norm, domain=domain, method="quadratic", effort=effort
    )
    assert bound.certified
    return float(bound.value)


def box(x: Tensor) -> lipfast.Box:
    return lipfast.Box(x.double() - BOX, x.double() + BOX)


# Linear relaxations, in floating point


def _lines(low: Tensor, high: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and offset of the chord above a ReLU, and the slope of the line below."""
    above = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    offset = torch.where((low < 0) & (high > 0), -above * low, 0.0)
    below = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, share.clamp(0, 1)))
    return above, offset, below


def _operands(
    weights: list[Tensor], biases: list[Tensor], x: Tensor, shares: list[Tensor]
) -> list[Range]:
    """Ranges of what ReLUs read on the box."""
    ranges: list[Range] = []
    for last in range(len(weights) - 1):
        ends = []
        for sign in (-1.0, 1.0):
            rows, added = weights[last] * sign, biases[last] * sign
            for layer in range(last - 1, -1, -1):
                above, offset, below = _lines(*ranges[layer], shares[layer])
                up, down = rows.clamp_min(0), rows.clamp_max(0)
                rows = up * above + down * below
                added = added + up @ offset + rows @ biases[layer]
                rows = rows @ weights[layer]
            ends.append(sign * (rows @ x + added + BOX * rows.abs().sum(1)))
        ranges.append((ends[0], ends[1]))
    return ranges


def _row(weights: list[Tensor], ranges: list[Range], output: int) -> Tensor:
    """The largest sum of one row of Jacobians: relaxations from the output to the inputs."""
    first = weights[-1][output]
    low = high = first
    lines: list[tuple[Tensor, ...]] = []
    for layer in range(len(weights) - 2, -1, -1):
        least, most = ((ranges[layer][0] >= 0).double(), (ranges[layer][1] > 0).double())
        width = (high - low).clamp_min(1e-300)
        tops, floors = (
            [bound(least * end, most * end) for end in (low, high)]
            for bound in (torch.maximum, torch.minimum)
        )
        steep, flat = ((own[1] - own[0]) / width for own in (tops, floors))
        steep, flat = (torch.where(high > low, s, most) for s in (steep, flat))
        lines.append((steep, tops[0] - steep * low, flat, floors[0] - flat * low))
        ends = []
        for sign in (-1.0, 1.0):
            rows, added = weights[layer].T * sign, torch.zeros_like(weights[layer][0])
            for back in range(len(lines) - 1, -1, -1):
                up, down = rows.clamp_min(0), rows.clamp_max(0)
                added = added + up @ lines[back][1] + down @ lines[back][3]
                rows = up * lines[back][0] + down * lines[back][2]
                if back:
                    rows = rows @ weights[len(weights) - 1 - back].T
            ends.append(sign * (rows @ first + added))
        low, high = ends
    return torch.maximum(low.abs(), high.abs()).sum()


def linear_relaxations(dims: tuple[int, ...]) -> float:
    """The bound in norm inf on the box, with the lower lines of ReLUs searched for."""
    model, x = trained(dims)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    weights, biases = ([getattr(own, n).double() for own in layers] for n in ("weight", "bias"))
    zeros = [torch.zeros(len(bias), dtype=torch.float64) for bias in biases[:-1]]
    ranges = _operands(weights, biases, x.double(), zeros)
    shares = [(high > -low).double().requires_grad_() for low, high in ranges]
    optimizer = torch.optim.Adam(shares, RATE)
    best = math.inf
    for _ in range(STEPS):
        optimizer.zero_grad()
        ranges = _operands(weights, biases, x.double(), shares)
        rows = torch.stack([_row(weights, ranges, output) for output in range(dims[-1])])
        best = min(best, float(rows.max()))
        torch.autograd.backward(rows.max() + sum((high - low).sum() for low, high in ranges))
        optimizer.step()
    return best


PEER = "peer (auto_LiRPA)"


def skip_without_jacobians() -> None:
    """Skips where no release of auto_LiRPA with bounds of Jacobians is installed."""
    try:
        package: Any = importlib.import_module("auto_LiRPA")
    except ImportError as error:
        pytest.skip(f"{PEER}: {error}")
    if not hasattr(package.BoundedModule, "compute_jacobian_bounds"):
        pytest.skip(f"{PEER}: {package.__version__} has no bounds of Jacobians")


def auto_lirpa(dims: tuple[int, ...]) -> float:
    """The package's own bound."""
    package: Any = importlib.import_module("auto_LiRPA")
    perturbations: Any = importlib.import_module("auto_LiRPA.perturbations")
    model, x = trained(dims)
    bounded = package.BoundedModule(model, x[None])
    bounded.augment_gradient_graph(x[None])
    perturbation = perturbations.PerturbationLpNorm(norm=math.inf, eps=BOX)
    found = bounded.compute_jacobian_bounds(package.BoundedTensor(x[None], perturbation))
    return float(torch.as_tensor(found).max())


def bench_ball(benchmark: Benchmark) -> None:
    _, x = trained(DEEP)
    case = f"norm 2 on a ball of {BALL}, 40-64x10-10"
    domain = lipfast.Ball(BALL, x)
    measure(benchmark, case, "lipfast", (lambda: upper(DEEP, 2, domain), 1))
    gain = upper(DEEP, 2, None) / upper(DEEP, 2, domain)
    benchmark.extra_info["note"] = f"{gain:.1f} times below the bound everywhere"
    assert gain >= LEAST_GAIN


@pytest.mark.parametrize("dims", [WIDE, (40, 256, 256, 10)], ids=["three of 128", "two of 256"])
@in_turn("lipfast", "linear relaxations", PEER, turns=2)
def bench_box(benchmark: Benchmark, turn: int, implementation: str, dims: tuple[int, ...]) -> None:
    if implementation == PEER:
        skip_without_jacobians()
    _, x = trained(dims)
    case = f"norm inf on a box of {BOX}, {'-'.join(map(str, dims))}"
    calls = {
        "lipfast": lambda: upper(dims, math.inf, box(x)),
        "linear relaxations": lambda: linear_relaxations(dims),
        PEER: lambda: auto_lirpa(dims),
    }
    measure(benchmark, case, implementation, (calls[implementation], 1), warmup=not turn)
    if implementation != "lipfast" and not turn:
        ratio = calls["lipfast"]() / calls[implementation]()
        benchmark.extra_info["note"] = f"the bound is {ratio:.2f} times that of {implementation}"
        assert ratio <= MOST_ABOVE
