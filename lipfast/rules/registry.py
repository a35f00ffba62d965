"""The registry of rules: ATen op name -> what it does to a Lipschitz bound.

`RULES` is the one visible map. An op that is not in it is an error, never a silent 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, get_args

from torch import Tensor

from lipfast.errors import ArgumentError, UnsupportedOpError, naming
from lipfast.graph.apply import call_op
from lipfast.graph.nodes import Argument, Constant, Node, Reference, error_name
from lipfast.norms import Norm
from lipfast.ops.chain_stages import Stage
from lipfast.rules.advice import advice
from lipfast.rules.guard import PARTS, Guarded, check_facts, constant_slopes
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.upward import Upward


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
        wrapped: before and after each axis, how much is read from its other end in the place of
            zeros; empty without circular padding.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same"]
    dilation: tuple[int, ...]
    groups: int
    output_padding: tuple[int, ...] = ()
    transposed: bool = False
    wrapped: tuple[tuple[int, int], ...] = ()

    @property
    def circular(self) -> bool:
        """Whether the padding is circular."""
        return bool(self.wrapped)

    def sides(self, kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis, for a kernel of these sizes."""
        if self.wrapped:
            return self.wrapped
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
# The error of each tensor operand, or None where it is exact.
Errors: TypeAlias = Sequence["Tensor | None"]
# (arguments, errors, output) -> error of the output, elementwise.
RoundingError: TypeAlias = Callable[[Arguments, Errors, Tensor], Tensor]
# (node, shape of a sample that it reads) -> stages of a chain, or None where it holds none.
Stages: TypeAlias = Callable[[Node, tuple[int, ...]], "Sequence[Stage] | None"]
# (alpha, beta), all difference quotients between them; tensors broadcast against one sample.
SlopeRange: TypeAlias = "tuple[float | Tensor, float | Tensor]"
Slopes: TypeAlias = Callable[[Call], "SlopeRange | None"]
Batch: TypeAlias = Literal["size", "repeat"]
ParameterErrors: TypeAlias = Literal["added", "multiplied", "read"]
# Weights (out, in), (in, out), (out, in / groups, ...), (in, out / groups, ...); one per channel.
Affine: TypeAlias = Literal[
    "matrix", "transposed matrix", "convolution", "transposed convolution", "channels"
]


@dataclass(frozen=True)
class Dimensions:
    """Which arguments of an op name dimensions; tracing counts them from the front.

    Attributes:
        names: position -> name of the argument.
        of_result: counted among the dimensions of the result (``stack``), not of the first operand.
        default: what is meant where none is given.
        order: all of them are named, in a new order (``permute``).
    """

    names: Mapping[int, str]
    of_result: bool = False
    default: int | None = None
    order: bool = False


@dataclass(frozen=True)
class Rule:
    """All that lipfast knows of one op.

    Attributes:
        op: ATen name without the overload. Of several results, the rule is of the first.
        bound: Lipschitz constant of the result with respect to the model's inputs.

    The others are the arguments of `rule` of the same names.
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
    dimensions: Dimensions | None = None
    casts: bool | None = None
    training: int | None = None
    dtype_eps: int | None = None
    fills: tuple[int, ...] | None = None
    batch: Batch | None = None
    leading: bool = False
    reshapes: bool = False
    moves: bool = False
    integers: bool = False
    parameter_errors: ParameterErrors | None = None
    maskable: bool = False
    affine: Affine | None = None
    stage: Stages | None = None
    slopes: Slopes | None = None


# Arguments of `rule` that are one of a few words.
_WORDS = {"batch": get_args(Batch), "parameter_errors": get_args(ParameterErrors)}
_WORDS["affine"] = get_args(Affine)
RULES: dict[str, Rule] = {}
# The entries that lipfast ships; empty while they are being registered.
_SHIPPED: dict[str, Rule] = {}
# What an op without a rule is taken for.
_NO_RULE = Rule("", lambda call: call.unbounded("it has no rule"))
# What the arguments of an op mean, whatever its bound, and which of its calls are refused.
_KEPT = ("dimensions", "casts", "training", "dtype_eps", "fills", "supports")


def rule(
    *ops: str,
    layer: Callable[[Node], LayerRequest] | None = None,
    supports: Callable[[Node], str | None] | None = None,
    evaluate: Evaluate | None = None,
    error: RoundingError | None = None,
    breakpoints: Callable[[Node], tuple[float, ...]] | None = None,
    magnitude: Size | None = None,
    product: Callable[[Node], bool] | None = None,
    dimensions: Mapping[int, str] | Dimensions | None = None,
    casts: bool | None = None,
    training: int | None = None,
    dtype_eps: int | None = None,
    fills: tuple[int, ...] | None = None,
    batch: Batch | None = None,
    leading: bool = False,
    reshapes: bool = False,
    moves: bool = False,
    integers: bool = False,
    parameter_errors: ParameterErrors | None = None,
    maskable: bool = False,
    affine: Affine | None = None,
    stage: Stages | None = None,
    slopes: SlopeRange | Slopes | None = None,
) -> Callable[[Bound], Bound]:
    """Register the Lipschitz rule of one or more ATen ops.

    The function gets a `Call` and returns ``L(node)``, the Lipschitz constant of the op's result
    with respect to the model's inputs, for ``call.norm``: for an op with constant c this is
    ``call.input * c``. Side: upper. Products and sums of `Upward` numbers are rounded up, so the
    result is certified if the constants are at least the true ones. lipfast cannot know whether
    they are: bounds that rest on the rule say "given the rule of" the op (`Estimate.given`).

    Args:
        ops: names such as ``"aten.sin"`` (no overload). A later registration replaces an earlier
            one, also for plans that were made before: they are derived anew. Only what the op's
            arguments mean (`dimensions` to `fills`) and `supports` stay as they were where they
            are left out: a bound of -1 in the place of 1 would be of other entries, and what mixes
            samples would do so still.
        layer: for an op with a weight matrix: which operator norm the rule needs.
        supports: why a particular node is beyond this rule (a string), or None if it is not;
            ``lambda node: None`` lifts what the rule before refused.
        evaluate: evaluates many networks at once (default: the op itself).
        error: elementwise rounding error in float64, for the certified lower bound; without it
            a model with this op gets an uncertified lower bound.
        breakpoints: the kinks of a piecewise-linear pointwise function.
        magnitude: how large the result can be; from ``call.magnitudes``, those of the operands.
        product: whether the bound of a node needs `Call.magnitudes`; they are empty otherwise.
        dimensions: position -> name of the arguments that name dimensions of the first operand
            (or `Dimensions`): the rule sees them counted from the front, where 0 is the samples.
        casts: a dtype among the arguments says what is cast to first; between floating dtypes that
            is the identity, and left out.
        training: position of the flag that says "training", which is refused.
        dtype_eps: position of an eps that, where it is left out, is that of the dtype.
        fills: positions of numbers that the op puts beside the operand's entries; they are exact.
        batch: what the number of samples may be among the arguments: a ``size`` of a result that
            has as many, or how often one tensor is repeated (``repeat``: sizes at position 1).
            Otherwise such a node is refused: what a sample gives would depend on the others.
        leading: leading dimensions are treated alike, or named by `dimensions`: one more in front
            changes nothing. Only so samples and parts of them (windows) stay apart.
        reshapes: entries keep their order; only the shape changes.
        moves: the result holds entries of the operands, or numbers that the op puts in. Of computed
            parameters, the errors then move alike.
        integers: parameters may be of integers or truth values, which are exact numbers.
        parameter_errors: how rounding errors E of a parameter that is computed enter: ``added``;
            ``multiplied``, ``|E| |x|``, where the op is linear in both; or ``read`` by `error`
            itself, beside those of activations. Otherwise such a parameter is refused.
        maskable: entries -inf of the operand are left out; NaN says that there were no others.
        affine: layout of the weight of an affine map that others may be folded into or merged with
            (see `Affine`); an op with ``channels`` is itself folded into its neighbours.
        stage: which stages of `lipfast.ops.chain_stages` a node is in a fused chain.
        slopes: of an op that acts on its operand entry by entry, two numbers that all difference
            quotients ``(f(x) - f(y)) / (x - y)`` lie between, the first rounded down and the second
            up; or a function of a `Call` that returns them, as float64 tensors where entries
            differ (they broadcast against one sample), or None. They make bounds tighter that know
            signs, as that of norms 1 and inf does.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        ArgumentError: a name is not of the form ``namespace.name``, or an argument is none of its
            words or of another kind. What a part of the rule raises later, or returns amiss, is a
            `TraceError` that names the op, the module and the part.

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
    # The keyword arguments, which are the fields of a `Rule`.
    facts = {name: value for name, value in locals().items() if name != "ops"}
    if isinstance(dimensions, Mapping):
        facts["dimensions"] = Dimensions(dict(dimensions))
    if slopes is not None and not callable(slopes):
        facts["slopes"] = constant_slopes(slopes)
    check_facts(ops, facts, _WORDS)

    def register(bound: Bound) -> Bound:
        if not callable(bound):
            raise ArgumentError(f"a rule must be a function of a Call, not {bound!r}")
        for op in ops:
            parts = {
                name: part for name, part in facts.items() if name in PARTS and part is not None
            }
            parts["bound"] = bound
            if _SHIPPED:
                parts = {name: Guarded(op, name, part) for name, part in parts.items()}
            before = rule_of(op)
            kept = {name: getattr(before, name) for name in _KEPT if facts[name] is None}
            RULES[op] = Rule(op, **{**facts, **kept, **parts})
        return bound

    return register


def ship() -> None:
    """Take all rules that are registered for lipfast's own; every later one is a user's."""
    _SHIPPED.update(RULES)


def users_rules(nodes: Iterable[Node]) -> set[str]:
    """Ops of nodes whose rules are not lipfast's own: what is proved of them is given them."""
    ops = {node.op for node in nodes}
    return {op for op in ops if op in RULES and not written_here(RULES[op])}


def rule_of(op: str) -> Rule:
    """The entry of an op; one that says nothing where there is none."""
    return RULES.get(op, _NO_RULE)


def written_here(entry: Rule) -> bool:
    """Whether a rule is lipfast's own, not a user's."""
    return _SHIPPED.get(entry.op) is entry


def lookup(op: str) -> Rule:
    """Return the rule of an op.

    Raises:
        UnsupportedOpError: there is none.
    """
    if op not in RULES:
        raise UnsupportedOpError([(op, "")], advice([op]))
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
    for node in nodes:
        if node.op == "input":
            continue
        known = RULES.get(node.op)
        if known is None:
            missing.append((node.op, node.module))
        elif known.supports is not None:
            with naming(node.op, node.module):
                problem = known.supports(node)
            if problem is not None:
                missing.append((f"{node.op} ({problem})", node.module))
    if missing or others:
        raise UnsupportedOpError([*missing, *others], advice([op for op, _ in missing], others))
