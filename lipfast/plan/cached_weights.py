"""Refuse to trace weights that were computed before and kept beside the parameters."""

from __future__ import annotations

from torch import nn

from lipfast.errors import ArgumentError
from lipfast.plan.architecture import Architecture


def require_fresh(module: nn.Module, plan: Architecture, name: str) -> None:
    """Check that no numbers stand in the place of parameters: all state dicts would be alike.

    Numbers outside the state dict that are as many as those of a parameter which nothing reads are
    taken for what was computed of it: layers that keep such a weight (Cayley, LBDN) look like that
    once they were evaluated.

    Args:
        module: that was traced.
        plan: what it was traced to.
        name: of the module, for the message.

    Raises:
        ArgumentError: some do; names the parameter.
    """
    read = {entry for node in plan.computed for entry in node.names("parameter")}
    read.update(plan.used_parameters)
    idle = {entry: p.numel() for entry, p in module.named_parameters() if entry not in read}
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
