"""Fold BatchNorm (eval mode) into the affine map before or after it.

BatchNorm is ``x -> s x + t`` per channel with ``s = weight / sqrt(var + eps)`` and
``t = bias - mean s``. After an affine map, ``s (W x + b) + t = (diag(s) W) x + (s b + t)``.
Before one, ``W (s x + t) + b = (W diag(s)) x + (W t + b)``, unless the map pads with zeros: then
the linear part folds, and the shift does not.

Rounding of a folded weight W' of k folds: every entry is within ``10 k u |W'| + underflow`` of the
true one, where the second term is one number per weight (see `_underflow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.graph.nodes import Argument, Constant, Graph, Node, Reference, error_name, is_computed
from lipfast.ops.fetched import sent
from lipfast.plan.computed import evaluate_computed, evaluate_many, mapped, parameters_read
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import device_of
from lipfast.rounding import SMALLEST, UNIT_ROUNDOFF
from lipfast.rules.normalization import running_statistics
from lipfast.rules.registry import Affine, rule_of

# Roundings in one entry of a weight per fold: var + eps, root, quotient, product, and one to spare.
ROUNDINGS_PER_FOLD = 5


@dataclass(frozen=True)
class Scaling:
    """One BatchNorm: references to its tensors, and on which side of the affine map it stands."""

    weight: Reference | None
    bias: Reference | None
    mean: Reference
    variance: Reference
    eps: float
    after: bool


@dataclass(frozen=True)
class Folded:
    """An affine map whose tensors are computed from those of a state dict.

    Attributes:
        kind: layout of the weight.
        groups: of a convolution.
        weight: name of the weight in the state dict.
        bias: name of the bias, if there is one.
        scalings: innermost first, in the order in which they are folded.
    """

    kind: Affine
    groups: int
    weight: str
    bias: str | None
    scalings: tuple[Scaling, ...]


@dataclass(frozen=True, eq=False)
class FoldedGraph:
    """A graph with fewer nodes, and how the parameters that are new in it are computed.

    Attributes:
        graph: refers to the new parameters as ``<node>.weight`` and ``<node>.bias`` (with a prefix
            that no state dict has).
        maps: node name -> how its tensors are computed.
        merged: how weights of merged affine maps are computed, from those and the state dict.
        origins: name of a merged affine node -> the weights that it is made of.
    """

    graph: Graph
    maps: Mapping[str, Folded]
    merged: tuple[Node, ...] = ()
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def parameters(
        self,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Constant],
        where: str = "",
    ) -> dict[str, Tensor]:
        """The new parameters of the graph, with bounds of their errors where they are merged.

        Args:
            tensors: a resolved state dict.
            constants: of the plan.
            where: prefix for messages.

        Raises:
            NonFiniteError: a running variance is not above -eps, or a product overflows.
        """
        found = folded_parameters(self.maps, tensors, constants, where)
        if not self.merged:
            return found
        known = {**tensors, **found, **self._errors(found)}
        return {**found, **evaluate_computed(self.merged, known, constants, where)}

    def _errors(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bounds of the errors of folded weights, entry by entry."""
        return {
            error_name(folded_name(node, "weight")): (
                found[folded_name(node, "weight")].abs() * fold_roundings(len(map_.scalings))
                + found[folded_name(node, "underflow")]
            )
            * (1.0 + 2.0**-30)
            for node, map_ in self.maps.items()
        }

    def parameters_together(
        self, networks: ResolvedNetworks, constants: Mapping[str, Constant]
    ) -> tuple[dict[str, Tensor], Tensor] | None:
        """`parameters` of many networks, (N, *shape) each, without a look at a number.

        Also returns for each network whether `parameters` gives them: all are finite. None where
        networks have to be taken one by one.
        """

        def compute(entry: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            found, fine = _folded_and_finite(self.maps, entry, constants)
            if not self.merged:
                return found, fine
            known = {**entry, **found, **self._errors(found)}
            merged, right = evaluate_many(self.merged, known, constants)
            return {**found, **merged}, fine & right

        names = dict.fromkeys([*_parameters_of(self.maps), *parameters_read(self.merged)])
        return mapped(compute, networks.tensors(names))


def fold_roundings(folds: int) -> float:
    """Relative error of the entries of a weight that BatchNorms are folded into, with room.

    Beside it stands the number of ``<node>.underflow``; see `folded_parameters`.
    """
    return 2 * ROUNDINGS_PER_FOLD * folds * UNIT_ROUNDOFF


def folded_name(node: str, part: str) -> str:
    """Name of a computed parameter; not a valid name in a state dict."""
    return f"folded:{node}.{part}"


def fold_batch_norm(graph: Graph, *, values: bool) -> FoldedGraph:
    """Remove BatchNorms next to affine maps that nothing else reads.

    Args:
        graph: any graph.
        values: the function must stay the same. Otherwise only its differences must (what a
            Lipschitz constant sees): then BatchNorm also folds into a zero-padded convolution
            after it, where the shift would be cut off by the padding.

    Returns:
        The graph and the computed parameters; the same graph if there is nothing to fold.
    """
    maps: dict[str, Folded] = {}
    while True:
        step = _fold_one(graph, maps, values)
        if step is None:
            return FoldedGraph(graph, maps)
        graph, maps = step


def _fold_one(
    graph: Graph, maps: Mapping[str, Folded], values: bool
) -> tuple[Graph, dict[str, Folded]] | None:
    readers = graph.readers
    for norm in graph.nodes:
        if rule_of(norm.op).affine != "channels":
            continue
        source = graph.defining(norm.argument(0, "input"))
        alone = source is not None and len(readers[source.name]) == 1
        if source is not None and alone and source.name not in graph.outputs:
            folded = _with_scaling(source, norm, maps, after=True, values=values)
            if folded is not None:
                return _merge(graph, maps, keep=norm, drop=source, folded=folded)
        following = readers.get(norm.name, [])
        inner = len(following) == 1 and norm.name not in graph.outputs
        target = graph.node(following[0]) if inner else None
        if target is not None and graph.defining(target.argument(0, "input")) is norm:
            folded = _with_scaling(target, norm, maps, after=False, values=values)
            if folded is not None:
                return _merge(graph, maps, keep=target, drop=norm, folded=folded)
    return None


def _scaling_of(norm: Node, after: bool) -> Scaling:
    weight, bias, mean, variance, eps = running_statistics(norm)
    if mean is None or variance is None:
        raise ArgumentError(
            f"{norm.op} in module '{norm.module or '(root)'}': affine='channels' is for ops with "
            "the arguments of aten.batch_norm: a running mean and a running variance"
        )
    return Scaling(weight, bias, mean, variance, eps, after)


def _with_scaling(
    affine: Node, norm: Node, maps: Mapping[str, Folded], *, after: bool, values: bool
) -> Folded | None:
    """`affine` with one scaling more, if `norm` can be folded into it."""
    kind = rule_of(affine.op).affine
    matrix = kind in ("matrix", "transposed matrix")
    # BatchNorm scales dimension 1, a linear layer maps the last one.
    fits = len(norm.shape) == 1 if matrix else kind in ("convolution", "transposed convolution")
    shifted = kind == "transposed convolution" or (values and not matrix and _padded(affine))
    if kind is None or not fits or (shifted and not after):
        return None
    scaling = _scaling_of(norm, after)
    known = maps.get(affine.name)
    if known is not None:
        return replace(known, scalings=(*known.scalings, scaling))
    weight, bias = affine.operand(1, "weight"), affine.operand(2, "bias")
    # The rounding errors of a computed weight would have to be scaled, too.
    if weight is None or weight.kind != "parameter" or is_computed(weight.name):
        return None
    groups = 1 if matrix else int(affine.number(6, "groups", 1))
    return Folded(kind, groups, weight.name, None if bias is None else bias.name, (scaling,))


def _padded(convolution: Node) -> bool:
    padding = convolution.argument(4, "padding", 0)
    entries = padding if isinstance(padding, tuple) else (padding,)
    return any(entry not in (0, "valid") for entry in entries)


def _merge(
    graph: Graph, maps: Mapping[str, Folded], *, keep: Node, drop: Node, folded: Folded
) -> tuple[Graph, dict[str, Folded]]:
    """Put one affine node in the place of `keep`, reading what the earlier of the two read."""
    affine = drop if rule_of(keep.op).affine == "channels" else keep
    weight: Argument = Reference("parameter", folded_name(keep.name, "weight"))
    bias: Argument = Reference("parameter", folded_name(keep.name, "bias"))
    kwargs = tuple((key, value) for key, value in affine.kwargs if key != "bias")
    args = (drop.args[0], weight, bias, *affine.args[3:])
    merged = replace(affine, name=keep.name, args=args, kwargs=kwargs, shape=keep.shape)
    nodes = tuple(
        merged if node.name == keep.name else node for node in graph.nodes if node.name != drop.name
    )
    others = {name: value for name, value in maps.items() if name not in (keep.name, drop.name)}
    return Graph(nodes, graph.outputs), {**others, keep.name: folded}


def folded_parameters(
    maps: Mapping[str, Folded],
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
    where: str = "",
) -> dict[str, Tensor]:
    """The computed parameters of a folded graph, in float64.

    Each entry of a weight carries at most `ROUNDINGS_PER_FOLD` roundings per scaling; where numbers
    are denormal those are not relative, and ``<node>.underflow`` is what they add to an entry.

    Raises:
        NonFiniteError: a running variance is not above -eps, or a product overflows.
    """
    found: dict[str, Tensor] = {}
    for node, folded in maps.items():
        weight, bias, underflow = _compute(folded, parameters, constants)
        if not (bool(torch.isfinite(weight).all()) and bool(torch.isfinite(bias).all())):
            name = folded.scalings[0].variance.name
            raise NonFiniteError(
                f"{where}BatchNorm with '{name}' cannot be folded into '{folded.weight}': "
                "weight / sqrt(running_var + eps) is not finite"
            )
        found[folded_name(node, "weight")] = weight
        found[folded_name(node, "bias")] = bias
        found[folded_name(node, "underflow")] = underflow
    return found


def folded_together(
    maps: Mapping[str, Folded], networks: ResolvedNetworks, constants: Mapping[str, Constant]
) -> tuple[dict[str, Tensor], Tensor] | None:
    """`folded_parameters` of many networks, (N, *shape) each, without a look at a number.

    Also returns for each network whether all are finite. None where networks have to be taken one
    by one.
    """

    def compute(entry: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        return _folded_and_finite(maps, entry, constants)

    return mapped(compute, networks.tensors(_parameters_of(maps)))


def _folded_and_finite(
    maps: Mapping[str, Folded], entry: Mapping[str, Tensor], constants: Mapping[str, Constant]
) -> tuple[dict[str, Tensor], Tensor]:
    found: dict[str, Tensor] = {}
    for node, folded in maps.items():
        tensors = _compute(folded, entry, constants)
        for part, tensor in zip(("weight", "bias", "underflow"), tensors, strict=True):
            found[folded_name(node, part)] = tensor
    fine = torch.ones((), dtype=torch.bool, device=device_of(entry))
    for tensor in found.values():
        fine = fine & torch.isfinite(tensor).all()
    return found, fine


def _parameters_of(maps: Mapping[str, Folded]) -> list[str]:
    """Names of the parameters that folded ones are computed from."""
    names = [
        name
        for folded in maps.values()
        for name in (folded.weight, folded.bias, *_read_by(folded))
        if name is not None
    ]
    return list(dict.fromkeys(names))


def _read_by(folded: Folded) -> Iterator[str]:
    """Names of the parameters that the BatchNorms read."""
    for scaling in folded.scalings:
        for reference in (scaling.weight, scaling.bias, scaling.mean, scaling.variance):
            if reference is not None and reference.kind == "parameter":
                yield reference.name


def _compute(
    folded: Folded, parameters: Mapping[str, Tensor], constants: Mapping[str, Constant]
) -> tuple[Tensor, Tensor, Tensor]:
    def tensor(reference: Reference) -> Tensor:
        if reference.kind == "constant":
            constant = constants[reference.name].tensor()
            return sent(constant.double(), parameters[folded.weight].device)
        return parameters[reference.name].detach().double()

    weight = parameters[folded.weight].detach().double()
    bias = None if folded.bias is None else parameters[folded.bias].detach().double()
    underflow = weight.new_zeros(())
    for scaling in folded.scalings:
        scale, shift = _scale_and_shift(scaling, tensor)
        underflow = _underflow(weight, scale, underflow)
        if scaling.after:
            bias = shift if bias is None else bias * scale + shift
            weight = _with_scale(weight, scale, folded, after=True)
        else:
            moved = _of_shift(weight, shift, folded)
            bias = moved if bias is None else bias + moved
            weight = _with_scale(weight, scale, folded, after=False)
    assert bias is not None
    return weight, bias, underflow


def _underflow(weight: Tensor, scale: Tensor, before: Tensor) -> Tensor:
    """What underflow may add to an entry of ``s W``, beside errors relative to the entry.

    s = weight / sqrt(var + eps) and the product are off by at most 2^-1075 each beside their
    relative roundings, so the entry by ``2^-1075 (|W| + 1)``; what W is off by is multiplied by s.
    """
    if weight.numel() == 0:
        return before
    passed_on = (scale.abs().amax() * (1.0 + 2.0**-40) + SMALLEST) * before
    return passed_on * (1.0 + 2.0**-40) + (weight.abs().amax() + 1.0) * 4 * SMALLEST


def _scale_and_shift(
    scaling: Scaling, read: Callable[[Reference], Tensor]
) -> tuple[Tensor, Tensor]:
    scale = (read(scaling.variance) + scaling.eps).sqrt()
    scale = scale.reciprocal() if scaling.weight is None else read(scaling.weight) / scale
    shift = -read(scaling.mean) * scale
    return scale, shift if scaling.bias is None else shift + read(scaling.bias)


def _with_scale(weight: Tensor, scale: Tensor, folded: Folded, *, after: bool) -> Tensor:
    """``diag(s) W`` or ``W diag(s)``, whatever the layout of the weight."""
    if folded.kind == "transposed matrix":
        return weight * (scale if after else scale[:, None])
    if folded.kind == "matrix":
        return weight * (scale[:, None] if after else scale)
    axes = [1] * (weight.dim() - 2)
    if after and folded.kind == "convolution":
        return weight * scale.reshape(-1, 1, *axes)
    blocks = weight.reshape(folded.groups, -1, *weight.shape[1:])
    return (blocks * scale.reshape(folded.groups, 1, -1, *axes)).reshape(weight.shape)


def _of_shift(weight: Tensor, shift: Tensor, folded: Folded) -> Tensor:
    """``W t``: what a constant input t adds to every output (no padding)."""
    if folded.kind == "transposed matrix":
        return shift @ weight
    if folded.kind == "matrix":
        return weight @ shift
    blocks = weight.reshape(folded.groups, -1, weight.shape[1], weight[0, 0].numel()).sum(-1)
    return (blocks @ shift.reshape(folded.groups, -1, 1)).reshape(-1)


def parameter_shapes(
    maps: Mapping[str, Folded], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the computed weights."""
    return {
        folded_name(node, "weight"): tuple(shapes[folded.weight]) for node, folded in maps.items()
    }
