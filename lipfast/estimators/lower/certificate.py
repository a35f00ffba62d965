"""Certified lower bounds: difference quotients in float64 with running error bounds.

Autograd's value at a kink is not a derivative, and a float64 evaluation by itself proves nothing.
For any two points a, b, ``||f(a) - f(b)|| / ||a - b||`` is a lower bound on the Lipschitz constant.
The points are stored float64 numbers; f is evaluated with an elementwise bound of its rounding
error (running error analysis, Higham, 2002, sec. 3.3); the quotient is rounded down. So the result
holds in real arithmetic, at kinks and for smooth activations, whatever the points are. Only the
choice of the points (a direction and steps) is heuristic.

Assumed: sums and products of float64 are IEEE (in any order, fused or not; denormals are kept, see
`lipfast.ops.denormals`), and torch's float64 elementary functions are as accurate as
`rules.running_errors.EVALUATION_ROUNDOFFS` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.lower.error_norms import layer_norms, output_error_norms
from lipfast.graph.nodes import Node
from lipfast.ops._arguments import FLOATING
from lipfast.ops.chain_secants import PiecewiseLinearChains
from lipfast.ops.modes import forward_mode, plain_arithmetic
from lipfast.ops.threads import one_thread, threads
from lipfast.plan.architecture import Architecture
from lipfast.plan.chain import Chain
from lipfast.plan.interpret import evaluate, walk
from lipfast.plan.state import stack
from lipfast.rules.registry import Norm, rule_of
from lipfast.rules.rounding import UNIT_ROUNDOFF, gamma

# Relative to the size of the sample: long steps average out rounding errors, short ones
# curvature and kinks.
_LADDER = tuple(10.0**-power for power in range(7))
# Steps to the nearest kinks and half way; a network without kinks is linear everywhere.
_FRACTIONS = (0.99, 0.5)
_LONGEST = 100.0
_LARGEST_JACOBIAN = 1 << 22  # entries; beyond, the direction comes from products with it
_LARGEST_ACTIVATIONS = 1 << 25  # entries that rows of a Jacobian may take at once
_POWER_ITERATIONS = 20
# Quotients below this share of those without errors: errors are then bounded in norm as well.
_TIGHT = 0.99
# Bytes of parameters that are stacked at a time: they are read again and again, and what is much
# larger comes from memory, and from the system as new pages, every time.
_STACKED = 1 << 24
# Networks of the native op at a time, which reads their weights where they are.
_NATIVE = 256


@dataclass(frozen=True)
class Secants:
    """The best certified difference quotient of each network.

    Attributes:
        values: (networks,), rounded down; 0 where nothing could be proved.
        points: (networks, 2, *shape), the two stored points in float64.
    """

    values: Tensor
    points: Tensor

    def of(self, network: int) -> tuple[float, Tensor]:
        """Value and points (2, *shape) of one network."""
        return float(self.values[network]), self.points[network]


def certified_secants(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    samples: Tensor,
    *,
    norm: Norm = 2,
    memory: int = 1 << 30,
    domain: Domain | None = None,
) -> Secants:
    """Certified lower bounds from one sample per network.

    Args:
        plan: the architecture; every op must have an error rule (`missing_error_rules`).
        tensors: checked parameters of each network.
        samples: (networks, *shape): where to look, usually the arg-max of the Jacobian norm.
        norm: 1, 2 or inf.
        memory: bytes for stacked parameters and activations.
        domain: both points of a secant are moved into it.

    Returns:
        The best secant of each network among several steps along the direction that the Jacobian
        stretches most.
    """
    fitting = int(memory // _bytes_per_network(plan))
    together = _STACKED // max(1, _bytes_of_parameters(plan))
    chain = _native_chain(plan, tensors, samples)
    block = max(1, min(fitting, together if chain is None else _NATIVE))
    workers = torch.get_num_threads()
    with one_thread() if together > 1 else nullcontext():
        parts = [
            _block(
                plan,
                tensors[start : start + block],
                samples[start : start + block],
                norm=norm,
                memory=memory,
                domain=domain,
                chain=chain,
                workers=workers,
            )
            for start in range(0, len(tensors), block)
        ]
    return Secants(
        torch.cat([part.values for part in parts]), torch.cat([part.points for part in parts])
    )


def certified_quotient(
    plan: Architecture, tensors: Mapping[str, Tensor], pair: Tensor, *, norm: Norm = 2
) -> tuple[float, Tensor]:
    """``||f(a) - f(b)|| / ||a - b||`` for two given points (2, *shape), rounded down.

    0 where the points coincide or nothing can be proved.
    """
    with plain_arithmetic():
        points = pair.detach().to(torch.float64).clone().unsqueeze(0)
        networks = _networks(plan, [tensors], _native_chain(plan, [tensors], pair), workers=1)
        indices = (torch.tensor([0], device="cpu"), torch.tensor([1], device="cpu"))
        values = _proved(plan, [tensors], networks, points, indices, norm=norm, count=2)
        return float(values[0, 0]), points[0]


class _Networks(Protocol):
    """What secants need of N networks, one sample or C points of each: native or traced."""

    def jacobians(self, x: Tensor) -> Tensor: ...
    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]: ...
    def enclosures(self, points: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class _Traced:
    """Networks of any plan, node by node; parameters are stacked, in float64."""

    plan: Architecture
    parameters: Mapping[str, Tensor]

    def jacobians(self, x: Tensor) -> Tensor:
        return traced_jacobians(self.plan, self.parameters, x)

    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return kink_distances(self.plan, self.parameters, x, direction)

    def enclosures(self, points: Tensor) -> tuple[Tensor, Tensor]:
        return enclose(self.plan, self.parameters, points)


@dataclass(frozen=True)
class _Native:
    """Piecewise-linear chains, on all threads where torch's small operations have but one."""

    chains: PiecewiseLinearChains
    workers: int

    def jacobians(self, x: Tensor) -> Tensor:
        with threads(self.workers):
            return self.chains.jacobians(x)

    def kink_distances(self, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        with threads(self.workers):
            return self.chains.kink_distances(x, direction)

    def enclosures(self, points: Tensor) -> tuple[Tensor, Tensor]:
        with threads(self.workers):
            return self.chains.enclosures(points)


def _networks(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], chain: Chain | None, workers: int
) -> _Networks:
    if chain is None:
        return _Traced(plan, stack(tensors, plan.used_parameters, torch.float64))
    parameters = [chain.parameters(entry, plan.constants) for entry in tensors]
    weights, biases = [entry[0] for entry in parameters], [entry[1] for entry in parameters]
    return _Native(PiecewiseLinearChains(weights, biases, chain.stages), workers)


def _native_chain(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], samples: Tensor
) -> Chain | None:
    """The plan as `PiecewiseLinearChains` takes it, if it does and one thread each is right.

    What is larger gains more from products on all threads.
    """
    rows = sum(math.prod(shape) for shape in plan.output_shapes)
    columns = sum(math.prod(shape) for shape in plan.input_shapes)
    large = _bytes_of_parameters(plan) > _STACKED or rows * columns > _LARGEST_JACOBIAN
    if large or samples.device.type != "cpu":
        return None
    names = plan.used_parameters
    used = (entry[name] for entry in tensors for name in names)
    if not all(tensor.device.type == "cpu" and tensor.dtype in FLOATING for tensor in used):
        return None
    return plan.piecewise_linear_chain


def _bytes_of_parameters(plan: Architecture) -> int:
    return 8 * sum(math.prod(plan.shapes[name]) for name in plan.used_parameters)


def _bytes_per_network(plan: Architecture) -> int:
    parameters = sum(math.prod(plan.shapes[name]) for name in plan.used_parameters)
    activations = _activations(plan)
    outputs = sum(math.prod(shape) for shape in plan.output_shapes)
    rows = min(outputs, _rows_at_once(activations))
    points = 1 + 2 * (len(_LADDER) + len(_FRACTIONS))
    # Weights and their absolute values; values and errors; forward and backward passes per row.
    return 8 * (3 * parameters + 4 * points * activations + 4 * rows * activations) + 1


def _activations(plan: Architecture) -> int:
    return sum(math.prod(node.shape) for node in plan.graph.nodes)


def _rows_at_once(activations: int) -> int:
    return max(1, _LARGEST_ACTIVATIONS // max(1, activations))


def _block(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    samples: Tensor,
    *,
    norm: Norm,
    memory: int,
    domain: Domain | None,
    chain: Chain | None,
    workers: int,
) -> Secants:
    with plain_arithmetic():
        x = samples.detach().to(torch.float64).clone()
        networks = _networks(plan, tensors, chain, workers)
        direction = _direction(networks, x, norm)
        offsets, pairs = _steps(networks, x, direction)
        shape = [*offsets.shape, *[1] * (x.dim() - 1)]
        points = x.unsqueeze(1) + offsets.reshape(shape) * direction.unsqueeze(1)
        points = points if domain is None else domain.project(points)
        # Of a network that exceeds the memory alone, few points at a time.
        count = max(1, int(memory // (32 * len(x) * _activations(plan) + 1)))
        values = _proved(plan, tensors, networks, points, pairs, norm=norm, count=count)
        best = values.argmax(1)
        first, second = pairs
        rows = torch.arange(len(best), device="cpu")
        chosen = torch.stack([points[rows, first[best]], points[rows, second[best]]], 1)
        return Secants(values[rows, best], chosen)


def _proved(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    networks: _Networks,
    points: Tensor,
    pairs: tuple[Tensor, Tensor],
    *,
    norm: Norm,
    count: int,
) -> Tensor:
    """Certified quotients (networks, pairs), `count` points evaluated at a time.

    Errors are bounded elementwise; of networks so deep that little is left, in norm as well.
    """
    parts = [networks.enclosures(some) for some in torch.split(points, count, 1)]
    outputs, errors = (torch.cat(sides, 1) for sides in zip(*parts, strict=True))
    differences = _differences(points, outputs, pairs, norm)
    values = _less_errors(*differences, errors, pairs, norm)
    promised = _less_errors(*differences, torch.zeros_like(errors), pairs, norm)
    loose = values.amax(1) < _TIGHT * promised.amax(1)
    for network in loose.nonzero().flatten().tolist():
        own = points[network : network + 1]
        layers = layer_norms(plan, tensors[network])
        parts = [
            output_error_norms(plan, tensors[network], layers, some)
            for some in torch.split(own, count, 1)
        ]
        outputs, errors = (torch.cat(sides, 1) for sides in zip(*parts, strict=True))
        proved = quotients_in_norm(own, outputs, errors, pairs, norm)
        values[network] = torch.maximum(values[network], proved[0])
    return values


def _direction(networks: _Networks, x: Tensor, norm: Norm) -> Tensor:
    """Where each Jacobian stretches most, (networks, *shape): from it whole, or by products."""
    if norm == 2 and isinstance(networks, _Traced):
        rows = sum(math.prod(shape) for shape in networks.plan.output_shapes)
        if rows * x[0].numel() > _LARGEST_JACOBIAN:
            return _power_direction(networks.plan, networks.parameters, x)
    return steepest_direction(networks.jacobians(x), norm).reshape(x.shape)


def traced_jacobians(plan: Architecture, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """(networks, K, D): one copy of the sample per output, each asked for its own gradient."""
    rows = sum(math.prod(shape) for shape in plan.output_shapes)
    block = _rows_at_once(len(x) * _activations(plan))
    parts = []
    for start in range(0, rows, block):
        count = min(block, rows - start)
        with torch.enable_grad():
            copies = x.unsqueeze(1).expand(-1, count, *x.shape[1:]).clone().requires_grad_()
            outputs = evaluate(plan.graph, parameters, plan.constants, [copies])
            own = outputs[:, :, start : start + count].diagonal(dim1=1, dim2=2)
            (gradients,) = torch.autograd.grad(own.sum(), copies)
        parts.append(gradients.reshape(*gradients.shape[:2], -1))
    return torch.cat(parts, 1)


def _power_direction(plan: Architecture, parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Some power iterations with J^T J: for Jacobians that would not fit into memory.

    A direction that is not quite the steepest costs tightness only: a secant is valid along any.
    """

    def function(point: Tensor) -> Tensor:
        return evaluate(plan.graph, parameters, plan.constants, [point.unsqueeze(1)])

    def unit(vector: Tensor, otherwise: Tensor) -> Tensor:
        length = vector.flatten(1).norm(dim=1).reshape(-1, *[1] * (vector.dim() - 1))
        return torch.where(torch.isfinite(length) & (length > 0), vector / length, otherwise)

    generator = torch.Generator(device="cpu").manual_seed(0)
    start = torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    direction = unit(start, start)
    with torch.enable_grad():
        point = x.clone().requires_grad_()
        outputs = function(point)
    with forward_mode():
        for _ in range(_POWER_ITERATIONS):
            image = torch.func.jvp(function, (x,), (direction,))[1]
            (back,) = torch.autograd.grad(outputs, point, image, retain_graph=True)
            direction = unit(back, direction)
    return direction


def steepest_direction(jacobians: Tensor, norm: Norm) -> Tensor:
    """Find the input direction (networks, D) that each Jacobian stretches most.

    Norm 2: top right singular vector; 1: unit vector of the largest column; inf: signs of the
    largest row. Where the Jacobian is 0 or not finite, some direction.
    """
    finite = torch.nan_to_num(jacobians, nan=0.0, posinf=0.0, neginf=0.0)
    networks, rows, columns = finite.shape
    if norm == 1:
        largest = finite.abs().sum(1).argmax(1)
        return torch.nn.functional.one_hot(largest, columns).to(finite.dtype)
    if math.isinf(norm):
        largest = finite.abs().sum(2).argmax(1)
        row = finite[torch.arange(networks, device="cpu"), largest]
        return torch.where(row < 0, -1.0, 1.0).to(finite.dtype)
    peak = finite.abs().amax((1, 2), keepdim=True)
    scaled = finite / torch.where(peak > 0, peak, torch.ones_like(peak))
    if rows <= columns:
        _, vectors = torch.linalg.eigh(scaled @ scaled.mT)
        direction = (scaled.mT @ vectors[:, :, -1:]).squeeze(-1)
    else:
        _, vectors = torch.linalg.eigh(scaled.mT @ scaled)
        direction = vectors[:, :, -1]
    length = direction.norm(dim=1, keepdim=True)
    axis = torch.zeros_like(direction)
    axis[:, 0] = 1.0
    return torch.where(length > 0, direction / length, axis)


def _steps(
    networks: _Networks, x: Tensor, direction: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Offsets (networks, C) along the direction, and which pairs of them make a secant."""
    size = x.reshape(len(x), -1).abs().amax(1)
    scale = torch.where(size > 0, size, torch.ones_like(size))
    backward, forward = networks.kink_distances(x, direction)
    forward = torch.minimum(forward, _LONGEST * scale)
    backward = torch.minimum(backward, _LONGEST * scale)
    columns = [torch.zeros_like(scale)]
    pairs: list[tuple[int, int]] = []
    steps = [(fraction * backward, fraction * forward) for fraction in _FRACTIONS]
    steps += [(step * scale, step * scale) for step in _LADDER]
    for down, up in steps:
        low, high = len(columns), len(columns) + 1
        columns += [-down, up]
        pairs += [(low, high), (0, high), (low, 0)]
    return torch.stack(columns, 1), (
        torch.tensor([pair[0] for pair in pairs], device="cpu"),
        torch.tensor([pair[1] for pair in pairs], device="cpu"),
    )


def kink_distances(
    plan: Architecture, parameters: Mapping[str, Tensor], x: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor]:
    """How far the line ``x + t direction`` stays in the linear region, down and up: (networks,).

    Exact up to rounding for piecewise-linear networks: before the first kink every
    pre-activation is linear in t. A heuristic only: secants are valid whatever the step.
    """
    kinked: list[tuple[str, tuple[float, ...]]] = []
    for node in plan.graph.nodes:
        kinks = rule_of(node.op).breakpoints
        if kinks is not None:
            kinked.append((_source(node), kinks(node)))
    infinite = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
    backward, forward = infinite, infinite.clone()
    if not kinked:
        return backward, forward

    def activations(point: Tensor) -> dict[str, Tensor]:
        found = walk(plan.graph, parameters, plan.constants, [point.unsqueeze(1)], keep=True)
        return {name: found[name] for name, _ in kinked}

    with forward_mode():
        result = torch.func.jvp(activations, (x,), (direction,))
    values, slopes = result[0], result[1]
    for name, breakpoints in kinked:
        value, slope = values[name].flatten(1), slopes[name].flatten(1)
        for point in breakpoints:
            # A unit that does not move has no kink ahead: 0 / 0 and c / 0 are not distances.
            distance = torch.where(slope != 0, (point - value) / slope, math.inf)
            up = torch.where(distance > 0, distance, math.inf).amin(1)
            down = torch.where(distance < 0, -distance, math.inf).amin(1)
            forward, backward = torch.minimum(forward, up), torch.minimum(backward, down)
    return backward, forward


def _source(node: Node) -> str:
    return next(reference.name for reference in node.references() if reference.kind == "node")


def quotients(
    points: Tensor, outputs: Tensor, errors: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> Tensor:
    """Certified difference quotients (networks, pairs), rounded down; 0 where nothing is proved.

    With ``d = max(|f(a) - f(b)| - e_a - e_b, 0)`` elementwise, the value is
    ``||d|| / ||a - b||`` with the numerator rounded down and the denominator rounded up.
    """
    change, distance = _differences(points, outputs, pairs, norm)
    return _less_errors(change, distance, errors, pairs, norm)


def _less_errors(
    change: Tensor, distance: Tensor, errors: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> Tensor:
    """`quotients` from `_differences`."""
    u = UNIT_ROUNDOFF
    first, second = pairs
    room = (errors[:, first] + errors[:, second]) * (1 + 4 * u)
    proved = (change - room).clamp_min(0.0) * (1 - 2 * u)
    numerator = vector_norm(proved, norm) * (1 - gamma(proved.shape[-1] + 8))
    return _sound(numerator, distance)


def quotients_in_norm(
    points: Tensor, outputs: Tensor, errors: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> Tensor:
    """As `quotients`, where `errors` (networks, C) bound the outputs' errors in norm 2.

    ``||f(a) - f(b)|| >= ||f^(a) - f^(b)|| - E_a - E_b`` with ``||e||_inf <= ||e||_2`` and, of k
    outputs, ``||e||_1 <= sqrt(k) ||e||_2``.
    """
    change, distance = _differences(points, outputs, pairs, norm)
    u = UNIT_ROUNDOFF
    first, second = pairs
    factor = math.sqrt(outputs.shape[-1]) if norm == 1 else 1.0
    room = (errors[:, first] + errors[:, second]) * (factor * (1 + 16 * u))
    moved = vector_norm(change, norm) * (1 - gamma(change.shape[-1] + 8))
    return _sound((moved - room).clamp_min(0.0) * (1 - 2 * u), distance)


def _differences(
    points: Tensor, outputs: Tensor, pairs: tuple[Tensor, Tensor], norm: Norm
) -> tuple[Tensor, Tensor]:
    """Changes of the outputs elementwise, rounded down, and distances of the points, rounded up."""
    u = UNIT_ROUNDOFF
    first, second = pairs
    flat = points.reshape(*points.shape[:2], -1)
    change = (outputs[:, first] - outputs[:, second]).abs() * (1 - 2 * u)
    apart = (flat[:, first] - flat[:, second]).abs() * (1 + 4 * u)
    return change, vector_norm(apart, norm) * (1 + gamma(apart.shape[-1] + 8))


def _sound(numerator: Tensor, denominator: Tensor) -> Tensor:
    value = numerator / denominator * (1 - 4 * UNIT_ROUNDOFF)
    # Also false where the points coincide, the forward pass overflowed, or numbers are so small
    # that squares underflow or the quotient is denormal: its rounding is not relative then.
    sound = torch.isfinite(value) & (denominator > 1e-140) & (numerator > 1e-140)
    sound &= value > 1e-300
    return torch.where(sound, value, torch.zeros_like(value))


def vector_norm(vectors: Tensor, norm: Norm) -> Tensor:
    """Norm of non-negative vectors along the last dimension, at most k + 2 roundings each."""
    if norm == 1:
        return vectors.sum(-1)
    if math.isinf(norm):
        return vectors.amax(-1)
    return (vectors * vectors).sum(-1).sqrt()
