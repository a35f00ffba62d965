"""The registry of rules for ops on parameters: values in float64 with bounds of their errors.

With x the computed operand and e the bound of its error, every rule returns the computed result
and a bound that holds for all true operands within e of x (running error analysis, Higham, 2002,
section 3.3). The rules themselves are in `elementwise_errors`, `product_errors` and
`matrix_errors`; what they share with rules of activations is `lipfast.rules.running_errors`.

A rule is an ordinary function whose parameters are the arguments of the ATen op, in the schema's
order and with its names. Arguments that a rule has no parameter for are refused, never dropped.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lipfast.graph.nodes import Node, Reference, is_floating_dtype
from lipfast.rules.running_errors import finished

# Roundings of a bound itself.
ROOM = 16


@dataclass(frozen=True)
class Enclosure:
    """A tensor, and an elementwise bound of its error (None: it is exact)."""

    tensor: Tensor
    error: Tensor | None = None

    @property
    def radius(self) -> Tensor:
        """The bound of the error in float64; zeros for what is exact."""
        if self.error is not None:
            return self.error
        return torch.zeros_like(self.tensor, dtype=torch.float64)

    @property
    def exact(self) -> Tensor:
        """Entries without errors."""
        return self.radius == 0

    @property
    def whole(self) -> Tensor:
        """Integers without errors: sums and products of them below 2^53 are exact."""
        return (self.tensor == self.tensor.round()) & self.exact

    def unless(self, exact: Tensor) -> Enclosure:
        """The error is 0 where operands and result say that nothing is rounded."""
        return Enclosure(self.tensor, torch.where(exact, 0.0, self.radius))

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> Enclosure:
        """Entries moved, and their errors alike."""
        return Enclosure(change(self.tensor), None if self.error is None else change(self.error))


@dataclass(frozen=True)
class ParameterRule:
    """How an op is evaluated with its error, and why particular options are beyond that.

    `together` is for many networks at once, where `evaluate` looks at numbers.
    """

    evaluate: Callable[..., Enclosure]
    supports: Callable[..., str | None] | None = None
    together: Callable[..., Enclosure] | None = None


PARAMETER_RULES: dict[str, ParameterRule] = {}


def parameter_rule(
    *names: str,
    supports: Callable[..., str | None] | None = None,
    together: Callable[..., Enclosure] | None = None,
    namespace: str = "aten",
) -> Callable[[Callable[..., Enclosure]], Callable[..., Enclosure]]:
    """Register a function under names of ops.

    Args:
        names: without their namespace.
        supports: gets what the function gets, with references in the place of tensors; says why
            these arguments are beyond the rule, or None.
        together: takes the same arguments where no number may be looked at, if the function does.
        namespace: of the names.
    """

    def register(function: Callable[..., Enclosure]) -> Callable[..., Enclosure]:
        for name in names:
            PARAMETER_RULES[f"{namespace}.{name}"] = ParameterRule(function, supports, together)
        return function

    return register


def bind(node: Node) -> inspect.BoundArguments:
    """The arguments of a node by the parameters of its rule.

    Casts between floating dtypes are identities: such a dtype is left out, as is what is None.

    Raises:
        TypeError: there is an argument that the rule does not read.
    """
    signature = inspect.signature(PARAMETER_RULES[node.op].evaluate)
    args = list(node.args)
    while args and (args[-1] is None or is_floating_dtype(args[-1])):
        args.pop()
    kwargs = {
        name: value
        for name, value in node.kwargs
        if name in signature.parameters or not (value is None or is_floating_dtype(value))
    }
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def beyond_rule(node: Node) -> str | None:
    """Why the rule of a node does not cover its arguments; None if it does.

    An integer dtype is left to the evaluation, which knows whether the operands are integers.
    """
    kwargs = tuple(
        (name, value)
        for name, value in node.kwargs
        if not (isinstance(value, Reference) and value.kind == "dtype")
    )
    try:
        bound = bind(replace(node, kwargs=kwargs))
    except TypeError as error:
        return f"its rule does not cover these arguments: {error}"
    supports = PARAMETER_RULES[node.op].supports
    return None if supports is None else supports(*bound.args, **bound.kwargs)


def enclosed(operand: object) -> Enclosure:
    """An operand as float64; numbers of the code are exact."""
    if isinstance(operand, Enclosure):
        tensor = operand.tensor
        return operand if tensor.is_floating_point() else replace(operand, tensor=tensor.double())
    return Enclosure(torch.as_tensor(operand, dtype=torch.float64, device="cpu"))


def with_error(result: Tensor, error: Tensor) -> Enclosure:
    """A result with a bound of its error, but for the roundings of the bound itself."""
    return Enclosure(result, finished(error, ROOM))
