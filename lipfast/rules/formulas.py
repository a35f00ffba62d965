"""Pointwise ops as formulas of one variable: what a composition of several of them is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, TypeVar

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.rules.intervals import Interval
from lipfast.rules.pointwise import SOFTPLUS_THRESHOLD

# An instruction's name, and what it takes: numbers, tensors, or positions of earlier results.
Instruction: TypeAlias = tuple[Argument, ...]
_Value = TypeVar("_Value", bound="Algebra")


class Algebra(Protocol):
    """What a formula is evaluated on: jets on intervals, or tails."""

    def __add__(self: _Value, other: _Value, /) -> _Value: ...
    def __mul__(self: _Value, other: _Value, /) -> _Value: ...
    def __neg__(self: _Value) -> _Value: ...
    def square(self: _Value) -> _Value:
        """The square."""

    def larger(self: _Value, other: _Value) -> _Value:
        """The maximum."""

    def then(self: _Value, function: str) -> _Value:
        """One of `scalar_functions.FUNCTIONS` of it."""


def result(
    program: Sequence[Instruction],
    x: _Value,
    constant: Callable[[Interval], _Value],
    tensors: Mapping[Reference, Interval],
) -> _Value:
    """The value of a program for a variable.

    Args:
        program: of a `Formula`.
        x: the variable.
        constant: makes a value of numbers that do not depend on it.
        tensors: the numbers in parameters and constants.
    """
    values = [x]
    for op, *operands in program:
        first, *others = operands
        if op == "number":
            assert isinstance(first, float)
            values.append(constant(Interval.of(first)))
        elif op == "between":
            assert isinstance(first, float)
            assert isinstance(others[0], float)
            values.append(constant(Interval.of(first, others[0])))
        elif op == "tensor":
            assert isinstance(first, Reference)
            values.append(constant(tensors[first]))
        else:
            found = [values[position] for position in operands if isinstance(position, int)]
            values.append(_applied(str(op), found))
    return values[-1]


def _applied(op: str, operands: Sequence[_Value]) -> _Value:
    if op == "add":
        return operands[0] + operands[1]
    if op == "mul":
        return operands[0] * operands[1]
    if op == "neg":
        return -operands[0]
    if op == "square":
        return operands[0].square()
    if op == "larger":
        return operands[0].larger(operands[1])
    return operands[0].then(op)


def _operand_of(instruction: Instruction) -> int:
    assert isinstance(instruction[1], int)
    return instruction[1]


def _number(instruction: Instruction) -> float:
    assert isinstance(instruction[1], float)
    return instruction[1]


@dataclass
class Formula:
    """A program under construction; position 0 is the variable, equal parts are made once.

    `1 / (1 + exp(-u))`, `log(1 + exp(u))` and their like become sigmoid and softplus, which do not
    overflow.
    """

    program: list[Instruction] = field(default_factory=list)

    def _put(self, *instruction: Argument) -> int:
        if instruction not in self.program:
            self.program.append(instruction)
        return self.program.index(instruction) + 1

    def _made(self, position: int) -> Instruction:
        return self.program[position - 1] if position else ("x",)

    def finished(self, position: int) -> tuple[Instruction, ...]:
        """The program whose last result is the one at a position, without what it does not need."""
        needed, open_ = {position}, [position]
        while open_:
            own = [part for part in self._made(open_.pop())[1:] if type(part) is int and part]
            open_ += [part for part in own if part not in needed]
            needed.update(own)
        order = {old: new for new, old in enumerate(sorted(needed - {0}), 1)} | {0: 0}
        return tuple(
            tuple(order[part] if type(part) is int else part for part in self._made(old))
            for old in order
            if old
        )

    def number(self, value: float) -> int:
        """A number."""
        return self._put("number", float(value))

    def between(self, low: float, high: float) -> int:
        """A number that lies between two."""
        return self._put("between", low, high)

    def tensor(self, reference: Reference) -> int:
        """Entries of a parameter or a constant."""
        return self._put("tensor", reference)

    def add(self, first: int, second: int) -> int:
        """The sum."""
        return self._put("add", *sorted((first, second)))

    def neg(self, operand: int) -> int:
        """``-u``."""
        made = self._made(operand)
        if made[0] == "neg":
            return _operand_of(made)
        if made[0] == "number":
            return self.number(-_number(made))
        return self._put("neg", operand)

    def mul(self, first: int, second: int) -> int:
        """The product; ``exp(u) sigmoid(-u)`` is sigmoid(u)."""
        if first == second:
            return self._square(first)
        for one, other in ((first, second), (second, first)):
            if self._made(one) == ("number", 1.0):
                return other
            if self._made(one)[0] == "exp" and self._made(other)[0] == "sigmoid":
                u = _operand_of(self._made(one))
                if self._made(other) == ("sigmoid", self.neg(u)):
                    return self.then("sigmoid", u)
        return self._put("mul", *sorted((first, second)))

    def _square(self, operand: int) -> int:
        """``u^2``; of a sine or cosine ``(1 -+ cos 2u) / 2``, in which each wave occurs once."""
        made = self._made(operand)
        if made[0] not in ("sin", "cos"):
            return self._put("square", operand)
        wave = self.then("cos", self.mul(self.number(2.0), _operand_of(made)))
        half = self.number(0.5 if made[0] == "cos" else -0.5)
        return self.add(self.number(0.5), self.mul(half, wave))

    def larger(self, first: int, second: int) -> int:
        """The maximum."""
        return self._put("larger", *sorted((first, second)))

    def smaller(self, first: int, second: int) -> int:
        """The minimum."""
        return self.neg(self.larger(self.neg(first), self.neg(second)))

    def then(self, function: str, operand: int) -> int:
        """A function of `scalar_functions.FUNCTIONS`; of 1 + exp(u), perhaps a simpler one."""
        u = self._one_plus_exponential(operand)
        if u is not None and function == "inverse":
            return self.then("sigmoid", self.neg(u))
        if u is not None and function == "log":
            return self.then("softplus", u)
        made = self._made(operand)
        if function == "inverse" and made[0] == "number":
            return self.quotient_of_numbers(1.0, _number(made))
        return self._put(function, operand)

    def quotient_of_numbers(self, first: float, second: float) -> int:
        """``a / b`` of two numbers: between the float64 next to the rounded quotient."""
        if second == 0.0:
            return self.between(-math.inf, math.inf)
        found = first / second
        if math.frexp(second)[0] in (0.5, -0.5) and 2.0**-1000 < abs(found) < math.inf:
            return self.number(found)
        return self.between(math.nextafter(found, -math.inf), math.nextafter(found, math.inf))

    def _one_plus_exponential(self, position: int) -> int | None:
        made = self._made(position)
        if made[0] != "add":
            return None
        parts = [part for part in made[1:] if isinstance(part, int)]
        for one, other in (parts, parts[::-1]):
            if self._made(one) == ("number", 1.0) and self._made(other)[0] == "exp":
                return _operand_of(self._made(other))
        return None


# (formula, node, positions of its leading tensors and numbers) -> position; None if it is beyond.
Lowering: TypeAlias = Callable[[Formula, Node, Sequence[int]], "int | None"]
FORMULAS: dict[str, Lowering] = {}


def _formula(*ops: str) -> Callable[[Lowering], Lowering]:
    def register(lowering: Lowering) -> Lowering:
        FORMULAS.update(dict.fromkeys((f"aten.{op}" for op in ops), lowering))
        return lowering

    return register


def _function(name: str) -> Lowering:
    return lambda formula, node, operands: formula.then(name, operands[0])


for _name in ("sigmoid", "tanh", "erf", "exp", "log", "sin", "cos", "atan"):
    _formula(_name)(_function(_name))
_formula("reciprocal")(_function("inverse"))
_formula("sqrt")(_function("root"))
_formula("neg")(lambda formula, node, operands: formula.neg(operands[0]))
_formula("square")(lambda formula, node, operands: formula.mul(operands[0], operands[0]))
_formula("relu")(lambda f, node, operands: f.larger(operands[0], f.number(0.0)))
_formula("maximum")(lambda formula, node, operands: formula.larger(*operands))
_formula("minimum")(lambda formula, node, operands: formula.smaller(*operands))


@_formula("add", "sub", "rsub")
def _put_sum(f: Formula, node: Node, operands: Sequence[int]) -> int:
    first, second = operands[::-1] if node.op == "aten.rsub" else operands
    alpha = node.number(2, "alpha", 1.0)
    second = second if alpha == 1.0 else f.mul(second, f.number(alpha))
    return f.add(first, second if node.op == "aten.add" else f.neg(second))


@_formula("mul")
def _put_product(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.mul(*operands)


@_formula("div")
def _put_quotient(f: Formula, node: Node, operands: Sequence[int]) -> int | None:
    if node.argument(2, "rounding_mode") is not None:
        return None
    return f.mul(operands[0], f.then("inverse", operands[1]))


@_formula("pow")
def _put_power(f: Formula, node: Node, operands: Sequence[int]) -> int | None:
    exponent = node.argument(1, "exponent")
    if not isinstance(exponent, (int, float)) or exponent not in range(1, 65):
        return None
    found = operands[0]
    for digit in bin(int(exponent))[3:]:
        found = f.mul(found, found)
        found = f.mul(found, operands[0]) if digit == "1" else found
    return found


@_formula("rsqrt")
def _put_inverse_root(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.then("inverse", f.then("root", operands[0]))


@_formula("log1p")
def _put_log_of_one_plus(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.then("log", f.add(f.number(1.0), operands[0]))


@_formula("expm1")
def _put_exp_minus_one(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.add(f.then("exp", operands[0]), f.number(-1.0))


@_formula("abs")
def _put_size(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.larger(operands[0], f.neg(operands[0]))


_BETWEEN: Mapping[str, Callable[[Node], tuple[Argument, Argument]]] = {
    "aten.clamp": lambda node: (node.argument(1, "min"), node.argument(2, "max")),
    "aten.clamp_min": lambda node: (node.argument(1, "min"), None),
    "aten.clamp_max": lambda node: (None, node.argument(1, "max")),
    "aten.hardtanh": lambda n: (n.number(1, "min_val", -1.0), n.number(2, "max_val", 1.0)),
    "aten.relu6": lambda node: (0.0, 6.0),
}


@_formula("clamp", "hardtanh", "clamp_min", "clamp_max", "relu6")
def _put_clamped(f: Formula, node: Node, operands: Sequence[int]) -> int | None:
    least, most = _BETWEEN[node.op](node)
    if isinstance(least, Reference) or isinstance(most, Reference):
        return None
    found = operands[0]
    if isinstance(least, (int, float)):
        found = f.larger(found, f.number(least))
    return f.smaller(found, f.number(most)) if isinstance(most, (int, float)) else found


@_formula("leaky_relu")
def _put_leaky(f: Formula, node: Node, operands: Sequence[int]) -> int:
    slope = node.number(1, "negative_slope", 0.01)
    other = f.mul(operands[0], f.number(slope))
    return f.larger(operands[0], other) if slope <= 1.0 else f.smaller(operands[0], other)


def _hard_gate(f: Formula, x: int) -> int:
    """``min(max(x + 3, 0), 6) / 6``."""
    moved = f.smaller(f.larger(f.add(x, f.number(3.0)), f.number(0.0)), f.number(6.0))
    return f.mul(moved, f.quotient_of_numbers(1.0, 6.0))


@_formula("hardsigmoid", "hardswish")
def _put_hard(f: Formula, node: Node, operands: Sequence[int]) -> int:
    gate = _hard_gate(f, operands[0])
    return gate if node.op == "aten.hardsigmoid" else f.mul(operands[0], gate)


@_formula("silu")
def _put_silu(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.mul(operands[0], f.then("sigmoid", operands[0]))


@_formula("mish")
def _put_mish(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.mul(operands[0], f.then("tanh", f.then("softplus", operands[0])))


@_formula("log_sigmoid")
def _put_log_sigmoid(f: Formula, node: Node, operands: Sequence[int]) -> int:
    return f.neg(f.then("softplus", f.neg(operands[0])))


@_formula("softplus")
def _put_softplus(f: Formula, node: Node, operands: Sequence[int]) -> int | None:
    """The ideal function, from its threshold on: see `pointwise.softplus`."""
    beta = node.number(1, "beta", 1.0)
    if node.number(2, "threshold", 20.0) < SOFTPLUS_THRESHOLD or beta == 0.0:
        return None
    found = f.then("softplus", f.mul(operands[0], f.number(beta)))
    return f.mul(found, f.quotient_of_numbers(1.0, beta))


@_formula("gelu")
def _put_gelu(f: Formula, node: Node, operands: Sequence[int]) -> int | None:
    if node.argument(1, "approximate", "none") != "none":
        return None
    root = math.sqrt(0.5)
    scaled = f.mul(operands[0], f.between(math.nextafter(root, 0), math.nextafter(root, 1)))
    gate = f.add(f.number(1.0), f.then("erf", scaled))
    return f.mul(f.mul(operands[0], f.number(0.5)), gate)


@_formula("softsign")
def _put_softsign(f: Formula, node: Node, operands: Sequence[int]) -> int:
    size = f.larger(operands[0], f.neg(operands[0]))
    return f.mul(operands[0], f.then("inverse", f.add(f.number(1.0), size)))


FORMULAS["lipfast.softsign"] = FORMULAS.pop("aten.softsign")


def lowered(formula: Formula, node: Node, known: Callable[[Reference], int | None]) -> int | None:
    """Put a node into a formula; None where it is no function of one variable that is known.

    Args:
        formula: it grows.
        node: of the graph.
        known: position of what a node's result is in the formula.
    """
    lowering = FORMULAS.get(node.op)
    tensors = [value for value in node.args[:2] if isinstance(value, Reference)]
    if lowering is None or list(node.references()) != tensors:
        return None
    operands = []
    for value in node.args[:2]:
        if isinstance(value, Reference) and value.kind in ("parameter", "constant"):
            operands.append(formula.tensor(value))
        elif isinstance(value, Reference) and value.kind == "node":
            position = known(value)
            if position is None:
                return None
            operands.append(position)
        elif isinstance(value, (bool, int, float)):
            operands.append(formula.number(float(value)))
    return lowering(formula, node, operands)
