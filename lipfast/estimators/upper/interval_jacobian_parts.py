"""What a node does to Jacobians: its slopes, its matrix, a sum, or where entries are moved.

Part of the proof of the interval Jacobian: it says which ops are these, and of which numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lipfast.estimators.upper.sweep import ZERO, Step, Sweep
from lipfast.estimators.upper.together import Unread
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Constant, error_name
from lipfast.ops.fetched import Fetched, sent
from lipfast.plan.architecture import Architecture
from lipfast.plan.computed import mapped
from lipfast.plan.layers import Layer
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.rules.registry import Call, SlopeRange, written_here

Range: TypeAlias = "tuple[Tensor, Tensor]"
"""Least and largest slopes in float64, (1 or networks, entries)."""


@dataclass(frozen=True, eq=False)
class Pointwise:
    """A function of every entry of one operand.

    Attributes:
        step: the node.
        operand: name of what it reads.
        known: its slopes, where no parameter says them.
        numbers: those that all entries have, where they have.
    """

    step: Step
    operand: str
    known: Range | None
    numbers: tuple[float, float] | None

    def slopes(
        self, networks: ResolvedNetworks, plan: Architecture, device: torch.device
    ) -> Range | None:
        """Of all networks; None where one has none."""
        if self.known is not None:
            both = sent(torch.stack(self.known), device)
            return both[0], both[1]
        return slopes_of_networks(self.step, networks, plan.constants, device)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A linear map along the last axis.

    Attributes:
        operand: name of what it reads.
        layer: its weight.
        rows: vectors in front of the last axis.
    """

    operand: str
    layer: Layer
    rows: int


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of activations of one shape.

    Attributes:
        terms: name and factor of each.
    """

    terms: tuple[tuple[str, float], ...]


@dataclass(frozen=True, eq=False)
class Moves:
    """Entries of operands elsewhere, or more than once.

    Attributes:
        parts: name of an operand, positions in the result that hold an entry of it and positions
            of those entries, how often one occurs at most, and how many entries there are; None in
            the place of both positions where all are as they were.
    """

    parts: tuple[tuple[str, tuple[Tensor, Tensor] | None, int, int], ...]


JacobianPart: TypeAlias = "Pointwise | Matrix | Sum | Moves"

_PARTS_OF: WeakKeyDictionary[Sweep, tuple[JacobianPart, ...] | None] = WeakKeyDictionary()


def parts_of(plan: Architecture, sweep: Sweep) -> tuple[JacobianPart, ...] | None:
    """What every step of a sweep does; None where one is none of these."""
    if sweep not in _PARTS_OF:
        found = []
        for step in sweep.steps:
            part = _part_of(step, sweep.layers, plan.constants)
            if part is None:
                break
            found.append(part)
        _PARTS_OF[sweep] = tuple(found) if len(found) == len(sweep.steps) else None
    return _PARTS_OF[sweep]


def _part_of(
    step: Step, layers: Sequence[Layer], constants: Mapping[str, Constant]
) -> JacobianPart | None:
    node, own = step.node, written_here(step.rule)
    active = [name for name in step.names if name is not None]
    if own and step.rule.affine in ("matrix", "transposed matrix"):
        assert step.operation.layer is not None
        layer = layers[step.operation.layer]
        shape = step.shapes[step.names.index(active[0])]
        return Matrix(active[0], layer, math.prod(shape[:-1])) if math.prod(layer.shape) else None
    if own and node.op in ("aten.add", "aten.sub", "aten.rsub") and len(active) == 2:
        alpha = node.number(2, "alpha", 1.0)
        factors = {"aten.add": (1.0, alpha), "aten.sub": (1.0, -alpha), "aten.rsub": (-alpha, 1.0)}
        same = all(tuple(shape) == tuple(node.shape) for shape in step.shapes)
        return Sum(tuple(zip(active, factors[node.op], strict=True))) if same else None
    if own and step.rule.moves and active:
        if step.rule.reshapes:
            return Moves(((active[0], None, 1, math.prod(node.shape)),))
        return _moves_of(step, constants)
    return _pointwise_of(step, constants) if len(active) == 1 else None


def _pointwise_of(step: Step, constants: Mapping[str, Constant]) -> Pointwise | None:
    operand = next(name for name in step.names if name is not None)
    shape = step.shapes[step.names.index(operand)]
    if step.rule.slopes is None or tuple(shape) != tuple(step.node.shape):
        return None
    known = None
    with suppress(Exception):  # it reads parameters; or fails, as it will for each network
        found = slopes_of_step(step, Unread(), constants)
        if found is None:
            return None
        known = found[0][None], found[1][None]
    numbers = None
    if known is not None and known[0].numel():
        numbers = float(known[0][0, 0]), float(known[1][0, 0])
        alike = all(bool((end == one).all()) for end, one in zip(known, numbers, strict=True))
        numbers = numbers if alike else None
    return Pointwise(step, operand, known, numbers)


def slopes_of_networks(
    step: Step, networks: ResolvedNetworks, constants: Mapping[str, Constant], device: torch.device
) -> Range | None:
    """Slopes that parameters say, (networks, entries) each; None where a network has none.

    A composition, and a rule that a user wrote, look at numbers: those come from a device first,
    for which the host waits.
    """
    entries: Sequence[Mapping[str, Tensor]] = networks
    if device.type != "cpu":
        read = [ref.name for ref in step.references if ref.kind == "parameter"]
        tensors = networks.tensors([*read, *map(error_name, read)])
        if step.node.op != "lipfast.composition" and written_here(step.rule):
            return mapped(lambda own: slopes_of_step(step, own, constants), tensors)
        columns = [tensor.unbind() for tensor in Fetched(list(tensors.values())).read()]
        entries = [dict(zip(tensors, row, strict=True)) for row in zip(*columns, strict=True)]
    pairs = [slopes_of_step(step, entry, constants) for entry in entries]
    found = [own for own in pairs if own is not None]
    if len(found) < len(networks):
        return None
    low, high = (sent(torch.stack([own[side] for own in found]), device) for side in (0, 1))
    return low, high


def slopes_of_step(
    step: Step, parameters: Mapping[str, Tensor], constants: Mapping[str, Constant]
) -> Range | None:
    """Of one network, (entries) each."""
    assert step.rule.slopes is not None
    operands = [ZERO] * len(step.names)
    call = Call(step.node, math.inf, operands, list(step.shapes), 0.0, parameters, constants)
    found: SlopeRange | None = step.rule.slopes(call)
    if found is None:
        return None
    shape = step.node.shape
    low, high = (
        end if isinstance(end, Tensor) else torch.tensor(end, dtype=torch.float64, device="cpu")
        for end in found
    )
    low, high = low.double().expand(shape), high.double().expand(shape)
    return low.reshape(-1), high.reshape(-1)


def _moves_of(step: Step, constants: Mapping[str, Constant]) -> Moves | None:
    """Found by moving numbers of the entries, in two orders; None where it is not so found."""
    sizes = [math.prod(shape) for name, shape in zip(step.names, step.shapes, strict=True) if name]
    total = sum(sizes)
    upward = torch.arange(1.0, total + 1.0, dtype=torch.float64, device="cpu")
    try:
        moved = _op_on_numbers(step, upward, constants)
        read = (_op_on_numbers(step, upward + total, constants) - moved) == total
        back = _op_on_numbers(step, upward.flip(0), constants)
    except Exception:  # it reads parameters, or numbers of another kind
        return None
    source = torch.where(read, moved, 1.0).long() - 1
    if not bool((back == total - source)[read].all()):
        return None
    parts, first = [], 0
    for name, size in zip([name for name in step.names if name], sizes, strict=True):
        at = torch.nonzero(read & (source >= first) & (source < first + size)).flatten()
        own = source[at] - first
        often = int(torch.bincount(own).max()) if own.numel() else 0
        parts.append((name, (at, own), often, size))
        first += size
    return Moves(tuple(parts))


def _op_on_numbers(step: Step, numbers: Tensor, constants: Mapping[str, Constant]) -> Tensor:
    """The op on one sample whose entries are numbers, those of each operand in turn."""
    values, first = [], 0
    for reference, name, shape in zip(step.references, step.names, step.shapes, strict=True):
        if name is None:
            values.append(constants[reference.name].tensor())
            continue
        size = math.prod(shape)
        values.append(numbers[first : first + size].reshape(1, *shape))
        first += size
    if len(set(step.references)) < len(step.references):
        raise LookupError(f"{step.node} reads an operand twice")
    known = dict(zip(step.references, values, strict=True))
    return call_op(step.node, known.__getitem__, 1).reshape(-1)
