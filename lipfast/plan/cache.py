"""Plans of modules that were seen before: tracing takes tens of milliseconds, checking under one.

A plan is used again only if the module, evaluated once more on two samples, makes the same ATen
calls with the same scalar arguments on the same parameters (`plan.record`), no rule was registered
or taken away, and nothing of the plan is a value that the record does not show. Weights are not
part of a plan, so new weights need nothing. Entries vanish with their modules.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError, TraceError, UnsupportedOpError
from lipfast.plan.architecture import Architecture
from lipfast.plan.modules import evaluation_mode, named_tensors
from lipfast.plan.record import Record, record
from lipfast.plan.trace import trace
from lipfast.rules.registry import RULES

# id of the module -> the module (an id may be given again), its record, and its plan or why none.
_PLANS: dict[int, tuple[weakref.ref[nn.Module], Record, Architecture | str]] = {}


def cached_plan(module: nn.Module, example: Tensor) -> Architecture | None:
    """The module's plan, or None where it cannot be traced.

    Args:
        module: left as it is found.
        example: samples (B, D...), at least one.
    """
    example = _two_samples(example)
    signature = _signature(module, example)
    plan = None if signature is None else _planned(module, example, signature)
    return plan if isinstance(plan, Architecture) else None


def plan_or_reason(module: nn.Module, example: Tensor) -> Architecture | str:
    """`cached_plan`, or why there is none; a module whose calls do not tell is traced, too.

    Args:
        module: left as it is found.
        example: samples (B, D...), at least one.
    """
    example = _two_samples(example)
    return _planned(module, example, _signature(module, example))


def _planned(module: nn.Module, example: Tensor, signature: Record | None) -> Architecture | str:
    found = _PLANS.get(id(module))
    # Where calls do not tell, a reason is kept all the same: if it is stale, a plan is missed.
    known = signature or (tuple(example.shape), example.dtype, tuple(RULES.items()))
    if found is not None and found[0]() is module and found[1] == known:
        return found[2]
    plan: Architecture | str
    try:
        plan = trace(module, example)
    except (ArgumentError, TraceError, UnsupportedOpError) as error:
        plan = str(error)
    if isinstance(plan, str) or signature is not None:
        # The signature holds the values of constants: with others it is another one.
        key = id(module)
        _PLANS[key] = (weakref.ref(module, lambda _: _PLANS.pop(key, None)), known, plan)
    return plan


def is_known(module: nn.Module) -> bool:
    """Whether `known_plan` may find one."""
    found = _PLANS.get(id(module))
    return found is not None and found[0]() is module and isinstance(found[2], Architecture)


def known_plan(module: nn.Module, example: Tensor) -> Architecture | None:
    """The module's plan if there is one already and it still holds; nothing is traced."""
    if not is_known(module):
        return None
    _, signature, plan = _PLANS[id(module)]
    if isinstance(plan, str) or _signature(module, _two_samples(example)) != signature:
        return None
    return plan


def _two_samples(example: Tensor) -> Tensor:
    return torch.cat([example[:2], example[:2]])[:2].detach()


def _signature(module: nn.Module, example: Tensor) -> Record | None:
    """What the module calls, and the shapes; None where calls do not tell."""
    try:
        with evaluation_mode(module):
            state = module.state_dict(keep_vars=True)
            calls = record(module, (example,), state)
    except Exception:  # user code runs here; tracing would fail alike
        return None
    if calls is None:
        return None
    shapes = tuple((name, tuple(v.shape), v.dtype) for name, v in named_tensors(state).items())
    return (calls, shapes, tuple(RULES.items()))
