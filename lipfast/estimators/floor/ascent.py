r"""Search for slopes whose Jacobian has a large norm: alternating ascent, layer by layer.

Heuristic: whatever it finds is a pattern of slopes, and `found` proves how large its norm is.

$u^T J(\sigma) v$ is affine in the slopes of one activation, with the coefficient $a_j b_j$ for unit
j, where a is what reaches the activation from v and b what comes back to it from u. Going back from
u each activation's slopes are set to the ends of their ranges that raise it; b is then of the new
slopes behind, and a of those in front, which are still as they were. Going forward from v it is the
other way round. So no step lowers $u^T J v$, nor does the best v for the u, or u for the v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lipfast.estimators.floor.linear_graph import LinearGraph
from lipfast.graph.nodes import Constant
from lipfast.norms import Norm
from lipfast.ops.fetched import sent
from lipfast.plan.interpret import NodeArguments, joined_outputs


class Cell:
    """The slopes of one activation, (N, S, *shape), between two ends (N, 1, *shape)."""

    def __init__(self, low: Tensor, high: Tensor, slopes: Tensor) -> None:
        self.low, self.high, self.slopes = low, high, slopes
        self.moves = False
        self.reaches: Tensor | None = None
        self.returns: Tensor | None = None

    def raise_product(self) -> None:
        """Set slopes to the ends that raise the product; where they do not matter they stay."""
        assert self.reaches is not None and self.returns is not None
        product = self.reaches * self.returns
        raised = torch.where(product > 0, self.high, self.slopes)
        self.slopes = torch.where(product < 0, self.low, raised)


class _Slopes(torch.autograd.Function):
    """What reaches an activation times its slopes, which may move before on either way."""

    @staticmethod
    def forward(ctx: Any, reaches: Tensor, cell: Cell) -> Tensor:
        ctx.cell, cell.reaches = cell, reaches.detach()
        if cell.moves and cell.returns is not None:
            cell.raise_product()
        return reaches * cell.slopes

    @staticmethod
    def backward(ctx: Any, returns: Tensor) -> tuple[Tensor, None]:
        cell: Cell = ctx.cell
        cell.returns = returns
        if cell.moves:
            cell.raise_product()
        return returns * cell.slopes, None


class Patterns:
    """S patterns of slopes of each of N networks, and what their Jacobians do to vectors.

    Args:
        linear: the graph.
        parameters: of the networks, stacked, but for slopes.
        ends: of the slopes, as `LinearGraph.ends` gives them.
        slopes: per activation (N, S, *shape).
    """

    def __init__(
        self,
        linear: LinearGraph,
        parameters: Mapping[str, Tensor],
        ends: Sequence[tuple[Tensor, Tensor]],
        slopes: Sequence[Tensor],
    ) -> None:
        self._linear, self._parameters = linear, parameters
        self.cells = [Cell(low, high, own) for (low, high), own in zip(ends, slopes, strict=True)]
        self._shapes = [node.shape for node in linear.plan.graph.inputs]

    @property
    def slopes(self) -> list[Tensor]:
        """The patterns, which moves replace."""
        return [cell.slopes for cell in self.cells]

    def move(self, moves: bool) -> None:
        """Whether slopes move to what raises the norm."""
        for cell in self.cells:
            cell.moves = moves

    def images(self, v: Tensor) -> Tensor:
        """J v, (N, S, K), for directions (N, S, D)."""
        graph, constants = self._linear.plan.graph, self._linear.plan.constants
        tables = {name: _typed(constant, v) for name, constant in constants.items()}
        parts = torch.split(v, [math.prod(shape) for shape in self._shapes], 2)
        activations = {
            node.name: part.reshape(*v.shape[:2], *node.shape)
            for node, part in zip(graph.inputs, parts, strict=True)
        }
        known = {unit.name: unit for unit in self._linear.units}
        cells = dict(zip(known, self.cells, strict=True))
        for node in graph.nodes:
            if node.name in cells:
                reaches = activations[known[node.name].source]
                activations[node.name] = _Slopes.apply(reaches, cells[node.name])  # type: ignore[no-untyped-call]
            elif node.op != "input":
                arguments = NodeArguments(node, activations, self._parameters, tables)
                activations[node.name] = arguments.replaced({}, {})
        return joined_outputs(graph, activations)

    def round(
        self, v: Tensor, u: Tensor | None, norm: Norm, pinned: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Forward from v and back from the best u for it: the next v, and u.

        Args:
            v: (N, S, D).
            u: (N, S, K), what goes back where J v is zero.
            norm: 1, 2 or inf.
            pinned: axes as vectors (N, S, D) of norm 1, (N, S, K) of norm inf: the column or row
                that is to be raised, whichever is the largest.
        """
        with torch.enable_grad():
            leaf = v.detach().requires_grad_()
            images = self.images(leaf)
        fallback = torch.ones_like(images) if u is None else u
        u = _dual(images.detach(), norm, fallback)
        if pinned is not None and math.isinf(norm):
            u = pinned
        (back,) = torch.autograd.grad(images, leaf, u, materialize_grads=True)
        if pinned is not None and norm == 1:
            return pinned, u
        return _dual(back, 1 if math.isinf(norm) else math.inf if norm == 1 else 2, v), u


def _typed(constant: Constant, like: Tensor) -> Tensor:
    value = constant.tensor()
    return sent(value.to(like.dtype) if value.dtype.is_floating_point else value, like.device)


def _dual(x: Tensor, norm: Norm, otherwise: Tensor) -> Tensor:
    """Vectors u of dual norm 1 with ``u . x = ||x||``; others where x is 0 or not finite."""
    if norm == 1:
        found = torch.where(x < 0, -1.0, 1.0).to(x)
    elif math.isinf(norm):
        largest = x.abs().argmax(2, keepdim=True)
        sign = torch.where(x.gather(2, largest) < 0, -1.0, 1.0).to(x)
        found = torch.zeros_like(x).scatter(2, largest, sign)
    else:
        peak = x.abs().amax(2, keepdim=True)
        scaled = x / torch.where(peak > 0, peak, 1.0)
        found = scaled / torch.linalg.vector_norm(scaled, 2, dim=2, keepdim=True)
    fine = torch.isfinite(x).all(2, keepdim=True) & (x != 0).any(2, keepdim=True)
    return torch.where(fine, found, otherwise)
