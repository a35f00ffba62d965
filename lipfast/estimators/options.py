"""Options that the public calls share: what each may be, and which call takes which.

`norm`, `domain`, `memory` and `progress` mean the same in every call. An option that would have no
meaning in a call is an error that says where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Literal, TypedDict, get_args

import numpy as np

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain, check_domain
from lipfast.norms import AnyNorm, Norm, check_norm

_SIDES = ("bounds", "lower_bound", "upper_bound")
_UPPER = ("Plan.bounds", "Plan.tracker", "Plan.upper")
# Option -> the calls that take it; searches have options of their own.
HOMES: dict[str, tuple[str, ...]] = {
    "domain": (*_SIDES, "Plan.bounds", "Plan.lower", "Plan.tracker", "Plan.upper"),
    "rtol": ("bounds", "upper_bound", *_UPPER),
    "seed": ("lower_bound", *_UPPER),
    "start": ("Plan.upper",),
    "simplify": ("Plan.upper",),
    "per_sample": ("bounds", "lower_bound", "Plan.bounds", "Plan.lower"),
    "search": ("lower_bound",),
    "method": ("jacobian_norms", "bounds", "upper_bound", *_UPPER),
    "effort": ("bounds", "upper_bound", *_UPPER),
    "floor": ("bounds", "Plan.bounds"),
    "details": ("jacobian_norms",),
    "create_graph": ("input_gradient_norms", "jacobian_norms"),
    "draws": tuple(
        f"lower_bound(search='{name}')" for name in ("convex", "neighbourhood", "ascent")
    ),
    "limit": tuple(f"lower_bound(search='{name}')" for name in ("convex", "pairs", "ascent")),
    "starts_from": ("lower_bound(search='ascent')",),
    "radius": ("lower_bound(search='neighbourhood')",),
    "noise": ("lower_bound(search='neighbourhood')",),
    "centres": ("lower_bound(search='neighbourhood')",),
    "steps": ("lower_bound(search='ascent')",),
    "starts": ("lower_bound(search='ascent')",),
    "step": ("lower_bound(search='ascent')",),
}


UpperMethod = Literal["product", "quadratic"]
"""Of an upper bound: the product of norms, or the smaller of it and quadratic constraints."""


class SharedOptions(TypedDict, total=False):
    """What every call takes."""

    norm: AnyNorm
    domain: Domain | None
    memory: int
    progress: bool | None


class LowerOptions(SharedOptions, total=False):
    """Of `Plan.lower`."""

    per_sample: bool


class UpperOptions(SharedOptions, total=False):
    """Of every call with an upper bound of a plan."""

    rtol: float
    seed: int
    method: UpperMethod
    effort: int


class ProductOptions(UpperOptions, total=False):
    """Of `Plan.upper`, but for `start`, which differs between one state dict and many."""

    simplify: bool


class BoundsOptions(LowerOptions, UpperOptions, total=False):
    """Of `Plan.bounds`."""

    floor: bool


def check_options(
    norm: object,
    domain: object = None,
    memory: object = 1,
    progress: object = None,
    *,
    shapes: Sequence[tuple[int, ...]] = (),
) -> Norm:
    """Check what all calls share; `shapes` are those of the model's inputs, where known.

    Returns:
        The norm as 1, 2 or inf.

    Raises:
        ArgumentError: one of them is not what it may be.
    """
    number = isinstance(memory, Real) and not isinstance(memory, bool)
    if not number or not 0 < memory < 2**63:  # type: ignore[operator]
        raise ArgumentError(f"memory must be a positive number of bytes, got {memory!r}")
    if progress is not None and not isinstance(progress, bool):
        raise ArgumentError(f"progress must be True, False or None, got {progress!r}")
    check_domain(domain, shapes)
    return check_norm(norm)


def check_method(method: object, effort: object, norm: Norm, domain: object = None) -> bool:
    """Whether quadratic constraints are asked for.

    Raises:
        ArgumentError: the method or the effort is none, or does not fit the norm and the domain.

    Examples:
        >>> check_method("quadratic", 2, 2)
        True
    """
    if method not in get_args(UpperMethod):
        raise ArgumentError(f"method must be 'product' or 'quadratic', got {method!r}")
    if isinstance(effort, bool) or effort not in (1, 2, 3):
        raise ArgumentError(f"effort must be 1, 2 or 3, got {effort!r}")
    if method == "quadratic" and norm != 2 and domain is None:
        raise ArgumentError(
            f"method='quadratic' bounds norm 2, not norm {norm:g}, unless a domain is given; the "
            "default, 'product', also takes the interval Jacobian there"
        )
    return method == "quadratic"


def upper_step(method: object) -> str:
    """What progress says while upper bounds are found."""
    return "quadratic constraints" if method == "quadratic" else "layer norms"


def check_flags(**flags: object) -> None:
    """Check options that are True or False.

    Raises:
        ArgumentError: one is something else, an array for instance.

    Examples:
        >>> check_flags(details=True, create_graph=False)
    """
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ArgumentError(f"{name} must be True or False, not {type(value).__name__}")


def refuse(call: str, options: Mapping[str, object]) -> None:
    """Raise for the options that a call does not take.

    Raises:
        ArgumentError: one is an option of other calls, which are named.
        TypeError: no call takes it.
    """
    for option in options:
        if option not in HOMES:
            raise TypeError(f"{call}() got an unexpected keyword argument '{option}'")
        raise ArgumentError(f"{call} has no option '{option}'{home_of(option)}")


def home_of(option: str) -> str:
    """Where an option has a meaning, as the end of a message; empty for one that nothing takes."""
    if option not in HOMES:
        return ""
    return f"; it is an option of {', '.join(HOMES[option])}"
