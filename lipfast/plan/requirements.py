"""What an architecture requires of the tensors of a state dict, derived from its graph once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lipfast.graph.nodes import Constant, Graph, Node, value_name
from lipfast.plan.masks import additive_masks, require_numbers
from lipfast.rules.normalization import default_eps
from lipfast.rules.registry import rule_of


@dataclass(frozen=True)
class Requirements:
    """What the tensors of a state dict must be.

    Attributes:
        masks: parameters, computed ones included, that may hold -inf.
        hides_entries: whether a constant holds -inf, or a mask puts it in.
        default_eps: the eps of normalisations that have none of their own: that of the trace's
            dtype.
        integers: parameters that may hold integers or truth values: factors, masks, tables of
            indices.
        values: parameters that must equal a constant: conditions of the model rest on them.
    """

    masks: frozenset[str]
    hides_entries: bool
    default_eps: frozenset[float]
    integers: frozenset[str]
    values: Mapping[str, Constant]


def requirements_of(
    graph: Graph,
    computed: Sequence[Node],
    constants: Mapping[str, Constant],
    parameters: Collection[str],
) -> Requirements:
    """The requirements of a traced graph.

    Raises:
        NonFiniteError: a constant holds NaN.
    """
    require_numbers(constants)
    found = (default_eps(node) for node in graph.nodes)
    known = (node for node in graph.nodes if not rule_of(node.op).integers)
    weights = {name for node in known for name in node.names("parameter")}
    return Requirements(
        masks=additive_masks(graph, computed),
        hides_entries=any(-math.inf in constant.values for constant in constants.values())
        or any(-math.inf in node.args for node in (*graph.nodes, *computed)),
        default_eps=frozenset(eps for eps in found if eps is not None),
        integers=frozenset(parameters) - weights,
        values={
            name: constants[value_name(name)]
            for name in parameters
            if value_name(name) in constants
        },
    )
