"""Names of a state dict against a plan: the level that a surrounding module adds."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lipfast.errors import StateDictError
from lipfast.estimators.plan import Plan


def fitted(
    state_dict: Mapping[str, Tensor], plan: Plan, prefix: str | None = None
) -> Mapping[str, Tensor]:
    """Return the part of a state dict that belongs to the plan's module.

    A LightningModule, for instance, keeps its network as `self.model` and saves `model.0.weight`
    beside whatever else it has. If exactly one prefix makes all names of the plan, the entries
    below it are taken.

    Args:
        state_dict: name -> tensor.
        plan: what names are wanted.
        prefix: the prefix, with or without its final dot, where the user says it.

    Raises:
        StateDictError: several prefixes fit, or none of the names has the given one.
    """
    if prefix is not None:
        return _below(state_dict, f"{prefix.rstrip('.')}.", plan)
    if not plan.parameters or any(name in plan.parameters for name in state_dict):
        return state_dict
    first = next(iter(plan.parameters))
    names = (first, *plan.aliases.get(first, ()))
    ends = [
        name.removesuffix(end) for name in state_dict for end in names if name.endswith(f".{end}")
    ]
    fitting = [prefix for prefix in dict.fromkeys(ends) if _holds_all(state_dict, prefix, plan)]
    if len(fitting) > 1:
        raise StateDictError(
            f"the architecture's names are there more than once, below "
            f"{', '.join(repr(prefix) for prefix in fitting[:5])}: choose with --prefix"
        )
    return _below(state_dict, fitting[0], plan) if fitting else state_dict


def _holds_all(state_dict: Mapping[str, Tensor], prefix: str, plan: Plan) -> bool:
    return all(
        any(
            f"{prefix}{name}" in state_dict
            for name in (parameter, *plan.aliases.get(parameter, ()))
        )
        for parameter in plan.parameters
    )


def _below(state_dict: Mapping[str, Tensor], prefix: str, plan: Plan) -> dict[str, Tensor]:
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
    if not found:
        shown = ", ".join(repr(name) for name in list(state_dict)[:3])
        raise StateDictError(f"no name begins with '{prefix}'; there are {shown} ...")
    return found
