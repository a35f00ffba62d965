"""State dicts checked against an architecture, once for all bounds that follow."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, NonFiniteError, StateDictError
from lipfast.graph.nodes import Constant
from lipfast.ops._arguments import check_device
from lipfast.ops.modes import plain_arithmetic
from lipfast.ops.threads import one_thread
from lipfast.plan.architecture import Architecture
from lipfast.plan.computed import evaluate_computed
from lipfast.plan.masks import holds_minus_infinity, require_visible_entries
from lipfast.plan.on_device import Resolved, resolved_on_device
from lipfast.plan.stacked import ResolvedNetworks, StackedStateDicts, stacked_entries
from lipfast.plan.state import (
    entries_of,
    require_dense_numbers,
    require_finite,
    require_finite_together,
)

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
        ArgumentError: its tensors are on several devices, or on one without kernels.
    """
    if isinstance(state_dict, CheckedStateDict) and state_dict.architecture is architecture:
        return state_dict
    return _resolved(architecture, [state_dict], [where]).settled()[0]


def _threads_for(architecture: Architecture) -> contextlib.AbstractContextManager[None]:
    small = sum(math.prod(shape) for shape in architecture.parameters.values()) < _SMALL
    return one_thread() if small else contextlib.nullcontext()


def _resolved(
    architecture: Architecture, state_dicts: Sequence[StateDict], wheres: Sequence[str]
) -> Resolved:
    """`resolve` of many, with their numbers looked at together."""
    entries = [
        _named(architecture, entry, where) for entry, where in zip(state_dicts, wheres, strict=True)
    ]
    on_cpu = _device_of(architecture, entries, wheres).type == "cpu"
    names = [_names_of_numbers(architecture, entry) for entry in entries]
    for entry, own, where in zip(entries, names, wheres, strict=True):
        for name in () if on_cpu else own:
            require_dense_numbers(entry[name], name, where)

    def carefully() -> ResolvedNetworks:
        return _each_resolved(architecture, entries, names, wheres)

    if on_cpu or not entries:
        return Resolved(carefully(), None, carefully)
    for entry, where in zip(entries, wheres, strict=True):
        _require_dtype(architecture, entry, where)
    with plain_arithmetic():
        together = stacked_entries(entries)
        if together is not None:
            networks = ResolvedNetworks(StackedStateDicts(together).entries, together)
            return resolved_on_device(architecture, networks, names[:1], carefully)
        return resolved_on_device(architecture, ResolvedNetworks(entries), names, carefully)


def _each_resolved(
    architecture: Architecture,
    entries: Sequence[dict[str, Tensor]],
    names: Sequence[Sequence[str]],
    wheres: Sequence[str],
) -> ResolvedNetworks:
    """Networks whose names fit, each with its own look at its numbers."""
    masks = architecture.requirements.masks
    with _threads_for(architecture):
        if len(entries) > 1 and all(own == names[0] for own in names[1:]):
            require_finite_together(entries, names[0], wheres, masks)
        else:
            for entry, own, where in zip(entries, names, wheres, strict=True):
                require_finite(entry, own, where, masks)
    pairs = zip(entries, wheres, strict=True)
    return ResolvedNetworks(_completed(architecture, entry, where) for entry, where in pairs)


def _names_of_numbers(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Sequence[str]:
    """Names of the tensors that must be numbers; some may be integers instead."""
    integers = architecture.requirements.integers
    if not integers:
        return architecture.stored_parameters
    return [
        name
        for name in architecture.stored_parameters
        if name not in integers or tensors[name].dtype.is_floating_point
    ]


def _named(architecture: Architecture, state_dict: StateDict, where: str) -> dict[str, Tensor]:
    """The entries under the architecture's own names."""
    tensors = entries_of(state_dict, architecture.parameters, architecture.aliases, where)
    for name in (*architecture.stored_parameters, *architecture.requirements.values):
        if name not in tensors:  # a counter, which most functions do not depend on
            raise StateDictError(
                f"{where}the state dict lacks '{name}', which the model computes with"
            )
    return tensors


def _device_of(
    architecture: Architecture, entries: Sequence[Mapping[str, Tensor]], wheres: Sequence[str]
) -> torch.device:
    """Where all tensors are that the function depends on.

    Raises:
        ArgumentError: on several devices, or on one without kernels.
    """
    names = architecture.stored_parameters
    if all(tensors[name].is_cpu for tensors in entries for name in names):
        return torch.device("cpu")
    first: tuple[str, torch.device] | None = None
    for tensors, where in zip(entries, wheres, strict=True):
        for name in names:
            device = tensors[name].device
            if first is None:
                first = f"{where}parameter '{name}'", device
            elif device != first[1] and not tensors[name].is_meta:
                raise ArgumentError(
                    f"{where}parameter '{name}' is on {device} and {first[0]} on {first[1]}: all "
                    f"tensors of a call must be on one device (tensor.to({str(first[1])!r}))"
                )
    assert first is not None
    if first[1].type != "meta":
        check_device(first[1], f"{first[0]} is")
    return first[1]


def _completed(
    architecture: Architecture, tensors: dict[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Checked numbers, and what is computed of them."""
    required, constants = architecture.requirements, architecture.constants
    _require_dtype(architecture, tensors, where)
    if required.values:
        _require_values(required.values, tensors, where)
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
) -> ResolvedNetworks:
    """`resolve` one or many state dicts, perhaps stacked; errors say which entry of a list."""
    return resolve_later(architecture, state_dicts).settled()


def resolve_later(
    architecture: Architecture, state_dicts: StateDict | Sequence[StateDict]
) -> Resolved:
    """`resolve_all`, of which checks may still be on their way from a device."""
    if isinstance(state_dicts, StackedStateDicts):
        return _resolved_stack(architecture, state_dicts)
    if isinstance(state_dicts, _CheckedNetworks) and state_dicts.architecture is architecture:
        return state_dicts.resolved()
    wheres, entries = _with_wheres(state_dicts)
    known = [
        isinstance(entry, CheckedStateDict) and entry.architecture is architecture
        for entry in entries
    ]
    others = [index for index, is_known in enumerate(known) if not is_known]
    if not others:
        if len(entries) > 1:
            _device_of(architecture, entries, wheres)
        return _right(ResolvedNetworks(dict(entry) for entry in entries))
    found = _resolved(
        architecture,
        [entries[index] for index in others],
        [wheres[index] for index in others],
    )
    if len(others) == len(entries):
        return found
    every = [dict(entry) for entry in entries]
    for index, tensors in zip(others, found.settled(), strict=True):
        every[index] = tensors
    _device_of(architecture, every, wheres)
    return _right(ResolvedNetworks(every))


def _with_wheres(state_dicts: StateDict | Sequence[StateDict]) -> tuple[list[str], list[StateDict]]:
    """What errors call state dicts, and the state dicts."""
    if isinstance(state_dicts, Mapping):
        return [""], [state_dicts]
    if isinstance(state_dicts, torch.nn.Module):
        raise ArgumentError("expected a state dict or a list of them: give model.state_dict()")
    given: object = state_dicts  # a tensor can be iterated over, but for one without dimensions
    if isinstance(given, Tensor) or not isinstance(given, Iterable):
        raise ArgumentError(
            f"expected a state dict or a list of them, not {type(state_dicts).__name__}"
        )
    entries = list(state_dicts)
    return [f"state dict {index}: " for index in range(len(entries))], entries


def _right(networks: ResolvedNetworks) -> Resolved:
    return Resolved(networks, None, lambda: networks)


class _CheckedNetworks(ResolvedNetworks):
    """Networks that were checked against an architecture, and what is on its way of the checks."""

    def __init__(self, resolved: Resolved, architecture: Architecture) -> None:
        super().__init__(resolved.networks, resolved.networks.stacked)
        self.architecture = architecture
        self._resolved = resolved

    def resolved(self) -> Resolved:
        """Say what is known of these."""
        # Made anew each time: a cycle of references would keep the weights.
        return replace(self._resolved, networks=self)


def checked_all(
    architecture: Architecture, state_dicts: StateDict | Sequence[StateDict]
) -> ResolvedNetworks:
    """`resolve_later` for several bounds, which take what it gives as it is, and settle it."""
    return _CheckedNetworks(resolve_later(architecture, state_dicts), architecture)


def _resolved_stack(architecture: Architecture, stacked: StackedStateDicts) -> Resolved:
    """`resolve` of stacked state dicts: names, shapes and numbers are looked at once for all."""
    count = len(stacked)
    shapes = {name: (count, *shape) for name, shape in architecture.parameters.items()}
    together = entries_of(stacked.tensors, shapes, architecture.aliases, "stacked state dicts: ")
    networks, required = StackedStateDicts(together), architecture.requirements
    wheres = [f"state dict {index}: " for index in range(count)]
    if not together.keys() >= {*architecture.stored_parameters, *required.values}:
        return _resolved(architecture, networks, wheres)
    on_cpu = _device_of(architecture, [together], ["stacked state dicts: "]).type == "cpu"
    floating = _names_of_numbers(architecture, together)

    def carefully() -> ResolvedNetworks:
        return _each_resolved(architecture, networks.entries, [floating] * count, wheres)

    if not on_cpu:
        _require_dtype(architecture, together, wheres[0])
        with plain_arithmetic():
            own = ResolvedNetworks(networks.entries, together)
            return resolved_on_device(architecture, own, [floating], carefully)
    try:
        require_finite_together([together], floating, [""])
    except NonFiniteError:  # of one network, which the error names
        require_finite_together(networks, floating, wheres, required.masks)
    pairs = zip(networks.entries, wheres, strict=True)
    return _right(ResolvedNetworks(_completed(architecture, *pair) for pair in pairs))
