"""Refuse to trace weights that were computed before and kept beside the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.plan.architecture import Architecture
from lipfast.plan.modules import lock_of, named_tensors


def require_fresh(
    module: nn.Module, plan: Architecture, read: Mapping[str, Tensor], name: str
) -> None:
    """Check that no numbers stand in the place of parameters: all state dicts would be alike.

    Numbers outside the state dict that are as many as those of a parameter which nothing reads are
    taken for what was computed of it: layers that keep such a weight (Cayley, LBDN) look like that
    once they were evaluated. Other state dicts would leave them, and loading one changes what
    shares its memory.

    Args:
        module: that was traced.
        plan: what it was traced to.
        read: tensors outside the state dict that it computes with.
        name: of the module, for the message.

    Raises:
        ArgumentError: some do; names the parameter.
    """
    with lock_of(module):
        _require_own_memory(named_tensors(module.state_dict()), read, name)
    if not read:  # then nothing was kept
        return
    used = {entry for node in plan.computed for entry in node.names("parameter")}
    used.update(plan.used_parameters)
    idle = {entry: p.numel() for entry, p in module.named_parameters() if entry not in used}
    for constant, value in plan.constants.items():
        owner, numbers = constant.rpartition(".")[0], value.tensor()
        for entry, size in idle.items():
            # The name of a number that was calculated in the trace says nothing of its owner.
            near = not owner or entry.rpartition(".")[0] == owner
            if near and numbers.is_floating_point() and numbers.numel() == size > 1:
                raise ArgumentError(
                    f"'{name}' does not use its parameter '{entry}', but '{constant}', which is "
                    "not in the state dict: a weight that was computed before and kept? Give a "
                    "model which was not evaluated yet, or a function that returns one"
                )


def _require_own_memory(
    state_dict: Mapping[str, Tensor], constants: Mapping[str, Tensor], name: str
) -> None:
    owners = {
        value.untyped_storage().data_ptr(): entry
        for entry, value in state_dict.items()
        if _owns_memory(value)
    }
    for constant, value in constants.items():
        entry = owners.get(value.untyped_storage().data_ptr()) if _owns_memory(value) else None
        if entry is not None:
            raise ArgumentError(
                f"'{name}' computes with {_named_constant(constant)} that is not in the state "
                f"dict and shares the memory of '{entry}': loading another one would change it. "
                f"Take it from '{entry}' in forward, or give it memory of its own (.clone())"
            )


def _named_constant(constant: str) -> str:
    return "a tensor" if constant.startswith("lifted_tensor") else f"'{constant}', a tensor"


def _owns_memory(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_meta and value.numel() > 0
