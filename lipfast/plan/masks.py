"""Additive masks: tables of -inf that leave a softmax fewer entries, and what they must not do.

-inf is an exact operand where it is added to finite numbers: the sum is -inf, and a softmax gives
it the weight 0. Everywhere else an infinite parameter is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lipfast.errors import NonFiniteError
from lipfast.graph.nodes import Constant, Graph, Node, Reference, computed_name
from lipfast.ops.modes import plain_arithmetic
from lipfast.plan.computed import moves
from lipfast.plan.constant_folding import ATTENTION
from lipfast.plan.interpret import NodeArguments, walk
from lipfast.plan.stacked import ResolvedNetworks
from lipfast.plan.state import device_of, stack
from lipfast.rules.registry import rule_of


def additive_masks(graph: Graph, computed: Sequence[Node]) -> frozenset[str]:
    """Parameters that are only added to activations, or moved (sliced, expanded) before that.

    The mask of an attention is added to its scores.
    """
    added: dict[str, bool] = {}

    def note(names: Iterable[str], *, adds: bool) -> None:
        added.update({name: added.get(name, True) and adds for name in names})

    for node in graph.nodes:
        adds = node.op == "aten.add" and node.argument(2, "alpha", 1) == 1
        mask = node.argument(3, "attn_mask") if node.op == ATTENTION else None
        if isinstance(mask, Reference) and mask.kind == "parameter":
            note([mask.name], adds=True)
        else:
            note(node.names("parameter"), adds=adds)
    for node in reversed(computed):
        moved = moves(node.op) and added.get(computed_name(node.name), True)
        note((*node.names("parameter"), *map(computed_name, node.names("node"))), adds=moved)
    return frozenset(name for name, adds in added.items() if adds)


def holds_minus_infinity(mask: Tensor) -> bool:
    """Whether any entry is -inf."""
    return bool((mask == -math.inf).any())


def require_numbers(constants: Mapping[str, Constant]) -> None:
    """Check that no constant holds NaN.

    Raises:
        NonFiniteError: one does; names it.
    """
    for name, value in constants.items():
        if any(math.isnan(entry) for entry in value.values):
            raise NonFiniteError(f"constant '{name}' of shape {value.shape} holds NaN")


def require_visible_entries(
    graph: Graph,
    parameters: Mapping[str, Tensor],
    constants: Mapping[str, Constant],
    where: str = "",
) -> None:
    """Check that masks of -inf leave every softmax an entry, at the input 0.

    Args:
        graph: of a plan.
        parameters: a resolved state dict.
        constants: of the plan.
        where: prefix for messages.

    Raises:
        NonFiniteError: a softmax gives NaN there, and so at every input; names the module.
    """

    def visit(node: Node, hidden: Callable[[], Tensor]) -> None:
        if bool(hidden()):
            raise NonFiniteError(
                f"{where}{node.op} in module '{node.module}' gives NaN: a mask of -inf leaves it "
                "no entry. Leave at least one entry of every row finite"
            )

    _look_at_softmaxes(graph, ResolvedNetworks([dict(parameters)]), constants, visit)


def all_visible(
    graph: Graph, networks: ResolvedNetworks, constants: Mapping[str, Constant]
) -> Tensor | None:
    """Whether `require_visible_entries` holds of all networks, without a wait; None: it does."""
    found: list[Tensor] = []
    _look_at_softmaxes(graph, networks, constants, lambda _, hidden: found.append(~hidden()))
    return torch.stack(found).all() if found else None


def _look_at_softmaxes(
    graph: Graph,
    networks: ResolvedNetworks,
    constants: Mapping[str, Constant],
    visit: Callable[[Node, Callable[[], Tensor]], None],
) -> None:
    """Shows every softmax, and whether masks leave it no entry at the input 0."""

    def look(arguments: NodeArguments, output: Tensor) -> None:
        if not rule_of(arguments.node.op).maskable:
            return

        def hidden() -> Tensor:
            source = arguments.value(arguments.node.args[0])
            given, found = (torch.isnan(value).flatten(1).any(1) for value in (source, output))
            return (found & ~given).any()

        visit(arguments.node, hidden)

    with plain_arithmetic():
        used = {name for node in graph.nodes for name in node.names("parameter")}
        stacked = stack(networks, sorted(used), torch.float64)
        device = device_of(stacked)
        zeros = [
            torch.zeros(len(networks), 1, *node.shape, dtype=torch.float64, device=device)
            for node in graph.inputs
        ]
        walk(graph, stacked, constants, zeros, look)
