"""Activations by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lipfast.errors import ArgumentError

ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {
    "none": None,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
OUTPUT_ACTIVATIONS: dict[str, Callable[[], nn.Module] | None] = {
    **ACTIVATIONS,
    "softmax": lambda: nn.Softmax(dim=-1),
}


def activation_modules(
    allowed: dict[str, Callable[[], nn.Module] | None], name: str, argument: str
) -> list[nn.Module]:
    """Return the module of that name in a list, which is empty for "none".

    Raises:
        ArgumentError: the name is unknown; the message says which argument it is.
    """
    if name not in allowed:
        raise ArgumentError(f"{argument} is {name!r}; allowed are {', '.join(allowed)}")
    build = allowed[name]
    return [] if build is None else [build()]
