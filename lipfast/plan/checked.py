"""State dicts checked against an architecture, once for all bounds that follow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, StateDictError
from lipfast.graph.nodes import Constant
from lipfast.ops.threads import one_thread
from lipfast.plan.architecture import Architecture
from lipfast.plan.computed import evaluate_computed
from lipfast.plan.masks import holds_minus_infinity, require_visible_entries
from lipfast.plan.state import entries_of, require_finite

_SMALL = 1 << 20  # elements of a state dict; below, several threads wait longer than they compute
StateDict: TypeAlias = Mapping[str, Tensor]


class CheckedStateDict(dict[str, Tensor]):
    """Tensors that were checked, under an architecture's own names; see `Plan.checked`."""

    def __init__(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> None:
        super().__init__(tensors)
        self.architecture = architecture


def resolve(
    architecture: Architecture, state_dict: StateDict, where: str = ""
) -> dict[str, Tensor]:
    """The tensors of a state dict under the architecture's own names, computed ones included.

    Args:
        architecture: what they must fit.
        state_dict: name -> tensor; see `Plan.check`.
        where: prefix for messages.

    Raises:
        StateDictError, NonFiniteError: see `Plan.check`.
    """
    if isinstance(state_dict, CheckedStateDict) and state_dict.architecture is architecture:
        return state_dict
    required = architecture.requirements
    tensors = entries_of(state_dict, architecture.parameters, architecture.aliases, where)
    for name in (*architecture.stored_parameters, *required.values):
        if name not in tensors:  # a counter, which most functions do not depend on
            raise StateDictError(
                f"{where}the state dict lacks '{name}', which the model computes with"
            )
    numbers = [
        name
        for name in architecture.stored_parameters
        if name not in required.integers or tensors[name].dtype.is_floating_point
    ]
    small = sum(math.prod(shape) for shape in architecture.parameters.values()) < _SMALL
    with one_thread() if small else nullcontext():
        require_finite(tensors, numbers, where, required.masks)
    _require_dtype(architecture, tensors, where)
    if required.values:
        _require_values(required.values, tensors, where)
    constants = architecture.constants
    if architecture.computed:
        found = evaluate_computed(architecture.computed, tensors, constants, where)
        tensors = {**tensors, **found}
    hidden = required.hides_entries
    if hidden or any(holds_minus_infinity(tensors[name]) for name in required.masks):
        require_visible_entries(architecture.graph, tensors, constants, where)
    return tensors


def _require_values(
    values: Mapping[str, Constant], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Conditions of the model are decided as in the state dict that it was traced with.

    Raises:
        StateDictError: an entry that one rests on has another value.
    """
    for name, constant in values.items():
        found, traced = tensors[name].detach().cpu(), constant.tensor()
        if not torch.equal(found.double(), traced.double()):
            raise StateDictError(
                f"{where}buffer '{name}' is {found.tolist()}, and the plan was traced with "
                f"{traced.tolist()}: the model decides by it what it computes. Trace the model "
                "with this state dict"
            )


def _require_dtype(architecture: Architecture, tensors: Mapping[str, Tensor], where: str) -> None:
    """A normalisation without an eps takes it from the dtype, which must be that of the trace.

    Raises:
        StateDictError: the weights are float64 and those of the trace were not, or vice versa.
    """
    eps = architecture.requirements.default_eps
    if not eps:
        return
    dtypes = {tensors[name].dtype for name in architecture.stored_parameters}
    dtypes = {dtype for dtype in dtypes if dtype.is_floating_point}
    double = torch.finfo(torch.float64).eps in eps
    wrong = torch.float64 not in dtypes if double else dtypes == {torch.float64}
    if not dtypes or not wrong:
        return
    raise StateDictError(
        f"{where}the weights are {'not ' if double else ''}float64, and those of the trace "
        f"were{'' if double else ' not'}: an RMSNorm without eps takes that of the "
        "dtype. Trace the model in the dtype of the state dict, or give RMSNorm an eps."
    )


def resolve_all(
    architecture: Architecture, state_dicts: StateDict | Sequence[StateDict]
) -> list[dict[str, Tensor]]:
    """`resolve` one or many state dicts; errors say which entry of a list."""
    if isinstance(state_dicts, Mapping):
        return [resolve(architecture, state_dicts)]
    if isinstance(state_dicts, torch.nn.Module):
        raise ArgumentError("expected a state dict or a list of them: give model.state_dict()")
    given: object = state_dicts  # a tensor can be iterated over, but for one without dimensions
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise ArgumentError(
            f"expected a state dict or a list of them, not {type(state_dicts).__name__}"
        )
    return [
        resolve(architecture, entry, f"state dict {index}: ")
        for index, entry in enumerate(state_dicts)
    ]
