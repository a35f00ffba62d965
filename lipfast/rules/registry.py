"""The registry of rules: ATen op name -> what it does to a Lipschitz bound.

`RULES` is the one visible map. An op that is not in it is an error, never a silent 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from torch import Tensor

from lipfast.errors import ArgumentError, UnsupportedOpError, naming
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Node, Reference, error_name
from lipfast.norms import Norm
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.upward import Upward

_HINT = (
    "Write one with @lipfast.rule({example!r}); its function gets a lipfast.rules.Call and returns "
    "call.input times a Lipschitz constant of the op."
)
_BAKE = (
    "Bake what is computed from parameters into the state dict (for parametrizations: "
    "torch.nn.utils.parametrize.remove_parametrizations)."
)


@dataclass(frozen=True)
class LayerRequest:
    """An operator norm that a rule needs: the bracket of one weight matrix.

    Attributes:
        kind: what the layer table calls it.
        parameter: name of the weight in the state dict.
        transposed: the operator is the transpose of the stored matrix (matters for norms 1, inf).
        convolution: how the weight is applied, if it is a kernel.
    """

    kind: str
    parameter: str
    transposed: bool = False
    convolution: ConvSettings | None = None


@dataclass(frozen=True)
class ConvSettings:
    """How a kernel is applied: arguments of a convolution, one entry per axis.

    Attributes:
        stride: distance of the windows.
        padding: zeros on either side, or ``same``.
        dilation: distance of the taps.
        groups: blocks of channels that do not mix.
        output_padding: of a transposed convolution.
        transposed: the adjoint of the convolution with this kernel.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same"]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] = ()
    transposed: bool = False

    def sides(self, kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Zeros before and after each axis, for a kernel of these sizes."""
        if isinstance(self.padding, tuple):
            return tuple((side, side) for side in self.padding)
        totals = [step * (size - 1) for step, size in zip(self.dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)


@dataclass
class Call:
    """What a rule sees when the bound is carried through one node.

    Attributes:
        node: the node, with its arguments and shapes.
        norm: 1, 2 or inf; the norm of the inputs and of the outputs.
        operands: for each tensor argument in order, its Lipschitz constant with respect to the
            inputs of the model; 0 for parameters and constants.
        operand_shapes: their shapes; those of activations are for one sample.
        layer: certified upper end of the bracket that the rule asked for (0 if it did not).
        parameters: the state dict.
        magnitudes: for each tensor argument in order, how large its values can be.
        reason: set by `unbounded`.
    """

    node: Node
    norm: Norm
    operands: Sequence[Upward]
    operand_shapes: Sequence[tuple[int, ...]]
    layer: float
    parameters: Mapping[str, Tensor]
    constants: Mapping[str, Constant] = field(default_factory=dict)
    magnitudes: Sequence[Magnitude] = ()
    reason: str | None = None

    @property
    def input(self) -> Upward:
        """Lipschitz constant of the first tensor argument with respect to the model's inputs."""
        return self.operands[0]

    def tensor(self, argument: Argument) -> Tensor:
        """Return the value of an argument that is a parameter or a constant.

        Raises:
            ArgumentError: the argument depends on the model's input.
        """
        if isinstance(argument, Reference):
            if argument.kind == "parameter":
                return self.parameters[argument.name]
            if argument.kind == "constant":
                return self.constants[argument.name].tensor()
        raise ArgumentError(f"{self.node}: {argument} is not a parameter or a constant")

    def rounding(self, argument: Argument) -> Tensor | None:
        """Bound of the rounding errors of a parameter that is computed; None if it is exact."""
        if isinstance(argument, Reference) and argument.kind == "parameter":
            return self.parameters.get(error_name(argument.name))
        return None

    def apply(self, x: Tensor) -> Tensor:
        """The op itself on one sample (*shape) in place of its first operand.

        Other operands must be parameters or constants.
        """
        first = next(ref for ref in self.node.references() if ref.kind == "node")

        def value(reference: Reference) -> Tensor:
            return x.unsqueeze(0) if reference == first else self.tensor(reference)

        return call_op(self.node, value, 1).squeeze(0)

    def unbounded(self, reason: str) -> Upward:
        """Answer "no finite constant", with its reason."""
        self.reason = reason
        return Upward.of(float("inf"))


class Arguments(Protocol):
    """The operands of one node while a batch of networks is evaluated (`plan.interpret`)."""

    node: Node

    def value(self, argument: Argument) -> Tensor:
        """Activation (networks, samples, *shape) or parameter (networks, *shape)."""

    def shape(self, argument: Argument) -> tuple[int, ...]:
        """Shape of an activation for one sample, or of a parameter or constant."""

    def apply(self, replaced: Mapping[Reference, Tensor]) -> Tensor:
        """The op itself on the operands, some of them replaced by other tensors alike."""


Bound: TypeAlias = Callable[[Call], "Upward | float"]
Size: TypeAlias = Callable[[Call], Magnitude]
Evaluate: TypeAlias = Callable[[Arguments], Tensor]
# (arguments, error of each tensor operand or None, output) -> error of the output, elementwise.
RoundingError: TypeAlias = Callable[[Arguments, "Sequence[Tensor | None]", Tensor], Tensor]


@dataclass(frozen=True)
class Rule:
    """All that lipfast knows of one op.

    Attributes:
        op: ATen name without the overload.
        bound: Lipschitz constant of the result with respect to the model's inputs.
        layer: the operator norm that `bound` needs, if any.
        supports: why a particular node is beyond the rule, or None.
        evaluate: evaluates many networks at once; None calls the op itself.
        error: propagates absolute errors in float64 (None: no certified lower bound through it).
        breakpoints: where a pointwise function has kinks.
        magnitude: how large the result can be (None: nothing is known).
        product: whether a node's bound needs the magnitudes of its operands.
    """

    op: str
    bound: Bound
    layer: Callable[[Node], LayerRequest] | None = None
    supports: Callable[[Node], str | None] | None = None
    evaluate: Evaluate | None = None
    error: RoundingError | None = None
    breakpoints: Callable[[Node], tuple[float, ...]] | None = None
    magnitude: Size | None = None
    product: Callable[[Node], bool] | None = None


RULES: dict[str, Rule] = {}


def rule(
    *ops: str,
    layer: Callable[[Node], LayerRequest] | None = None,
    supports: Callable[[Node], str | None] | None = None,
    evaluate: Evaluate | None = None,
    error: RoundingError | None = None,
    breakpoints: Callable[[Node], tuple[float, ...]] | None = None,
    magnitude: Size | None = None,
    product: Callable[[Node], bool] | None = None,
) -> Callable[[Bound], Bound]:
    """Register the Lipschitz rule of one or more ATen ops.

    The function gets a `Call` and returns ``L(node)``, the Lipschitz constant of the op's result
    with respect to the model's inputs, for ``call.norm``: for an op with constant c this is
    ``call.input * c``. Side: upper. Products and sums of `Upward` numbers are rounded up, so the
    result is certified if the constants are at least the true ones.

    Args:
        ops: names such as ``"aten.sin"`` (no overload). A later registration replaces an earlier.
        layer: for an op with a weight matrix: which operator norm the rule needs.
        supports: why a particular node is beyond this rule (a string), or None if it is not.
        evaluate: evaluates many networks at once (default: the op itself).
        error: elementwise rounding error in float64, for the certified lower bound; without it
            a model with this op gets an uncertified lower bound.
        breakpoints: the kinks of a piecewise-linear pointwise function.
        magnitude: how large the result can be; from ``call.magnitudes``, those of the operands.
        product: whether the bound of a node needs `Call.magnitudes`; they are empty otherwise.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        ArgumentError: a name is not of the form ``namespace.name``.

    Examples:
        >>> import torch, lipfast
        >>> @lipfast.rule("aten.asinh")
        ... def asinh(call):
        ...     return call.input * 1.0  # the derivative is 1 / sqrt(x^2 + 1) <= 1
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 3.0 * torch.asinh(x)
        >>> lipfast.upper_bound(Model(), torch.zeros(1, 2)).value
        3.0
        >>> _ = lipfast.rules.RULES.pop("aten.asinh")  # forget it again
    """
    for op in ops:
        if not isinstance(op, str) or op.count(".") != 1:
            raise ArgumentError(f"op must look like 'aten.sin' (no overload), not {op!r}")

    def register(bound: Bound) -> Bound:
        for op in ops:
            RULES[op] = Rule(
                op, bound, layer, supports, evaluate, error, breakpoints, magnitude, product
            )
        return bound

    return register


def lookup(op: str) -> Rule:
    """Return the rule of an op.

    Raises:
        UnsupportedOpError: there is none.
    """
    if op not in RULES:
        raise UnsupportedOpError([(op, "")], _HINT.format(example=op))
    return RULES[op]


def require_rules(nodes: Iterable[Node], others: Sequence[tuple[str, str]] = ()) -> None:
    """Check that every node has a rule that covers it.

    Args:
        nodes: of a graph.
        others: ops and modules on parameters alone that are beyond lipfast.

    Raises:
        UnsupportedOpError: lists every node that has none, with its module, and the others.
    """
    missing: list[tuple[str, str]] = []
    example = ""
    for node in nodes:
        if node.op == "input":
            continue
        known = RULES.get(node.op)
        if known is None:
            missing.append((node.op, node.module))
            # Control flow and attributes are no ops that a rule could be registered for.
            if node.op.count(".") == 1 and not node.op.startswith(("_", "get_attr.")):
                example = example or node.op
        elif known.supports is not None:
            with naming(node.op, node.module):
                problem = known.supports(node)
            if problem is not None:
                missing.append((f"{node.op} ({problem})", node.module))
    hints = [_HINT.format(example=example)] if example else []
    hints += [_BAKE] if others else []
    if missing or others:
        raise UnsupportedOpError([*missing, *others], " ".join(hints))
