"""Rules of products of activations: finite only where something bounds their size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipfast.graph.nodes import Node, Reference
from lipfast.rounding import SMALLEST, UNDERFLOW, UNIT_ROUNDOFF, widened
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import error_of_matmul, finished
from lipfast.rules.upward import Upward

ADVICE = (
    "a product of activations has a finite constant only where their size is bounded: by a "
    "normalisation before it, a bounded activation, or an input domain (domain=lipfast.Box(0, 1))"
)


def activations(node: Node) -> int:
    """How many of the first two arguments depend on the input."""
    return sum(isinstance(v, Reference) and v.kind == "node" for v in node.args[:2])


def copy_count(call: Call, position: int) -> int:
    """How often an operand is copied to the shape of the result."""
    size = math.prod(call.operand_shapes[position])
    return max(1, math.prod(call.node.shape) // max(1, size))


def _finite(call: Call, total: Upward) -> Upward:
    return total if not total.unbounded else call.unbounded(f"{call.node.op}: {ADVICE}")


def _part(call: Call, size: Magnitude, position: int) -> Upward:
    """``sup ||a b|| / ||b||`` over a of this magnitude, b the operand at `position`."""
    copies = copy_count(call, position)
    if copies == 1 or math.isinf(call.norm):
        factor = size.entry
    elif call.norm == 1:
        factor = size.entry * float(copies)
    else:  # b is copied: the Euclidean norm of a over the copies
        spread = size.entry * Upward.of(float(copies)).square_root()
        factor = min(spread, size.total, key=lambda value: value.log)
    return factor * call.operands[position]


def product(call: Call) -> Upward:
    """``L(x y) <= sup |x| L(y) + sup |y| L(x)``.

    Where y is broadcast, the first term has the largest Euclidean norm of x over the axes that y is
    copied along (p = 1: the number of copies times sup |x|).
    """
    first, second = call.magnitudes
    return _finite(call, _part(call, first, 1) + _part(call, second, 0))


def magnitude_of_product(call: Call) -> Magnitude:
    """Entries multiply; ``||x y|| <= sup |x| ||y||`` where y is not broadcast, and vice versa."""
    first, second = call.magnitudes
    found = Magnitude(entry=first.entry * second.entry)
    if copy_count(call, 1) == 1:
        found = found.tightened(second.scaled(first.entry))
    if copy_count(call, 0) == 1:
        found = found.tightened(first.scaled(second.entry))
    return found


def error_of_product(x: Tensor, y: Tensor, errors: Errors, output: Tensor) -> Tensor:
    """``|x| e_y + |y| e_x + e_x e_y + u |z|``."""
    total = output.abs() * UNIT_ROUNDOFF
    first, second = errors
    if second is not None:
        total = total + x.abs() * second
    if first is not None:
        total = total + y.abs() * first
    if first is not None and second is not None:
        total = total + first * second
    return finished(total, 8)


def divides(node: Node) -> bool:
    """Whether a node divides by an activation."""
    divisor = node.args[1] if node.op == "aten.div" else None
    return isinstance(divisor, Reference) and divisor.kind == "node"


def error_of_quotient(y: Tensor, errors: Errors, output: Tensor) -> Tensor:
    """``(e_x + |z| e_y) / (|y| - e_y)`` and the rounding; inf where y may be 0."""
    first, second = errors
    least = y.abs() if second is None else (y.abs() - widened(second, 2)) * (1 - 4 * UNIT_ROUNDOFF)
    total = torch.zeros_like(output) if first is None else first + torch.zeros_like(output)
    if second is not None:
        # The product may underflow, and then be divided by a small number.
        total = torch.where(second > 0, total + output.abs() * second + SMALLEST, total)
    total = torch.where(total > 0, total / least, 0.0) + output.abs() * (2 * UNIT_ROUNDOFF)
    return torch.where(least > 0, finished(total, 8), math.inf)


def _matmul_supported(node: Node) -> str | None:
    kinds = [v.kind if isinstance(v, Reference) else "number" for v in node.args[:2]]
    if not set(kinds) <= {"node", "parameter", "constant"} or len(node.args) != 2:
        return "with other arguments than two tensors"
    return "of vectors" if len(node.shape) < 2 else None


def _matrix(call: Call, position: int) -> Upward:
    """Largest Frobenius norm of the matrices that one operand consists of."""
    shape, size = call.operand_shapes[position], call.magnitudes[position]
    rows = shape[-2] if len(shape) > 1 else 1
    spread = size.row * Upward.of(float(rows)).square_root()
    return min(spread, size.total, key=lambda value: value.log)


def product_of_matrices(call: Call) -> Upward:
    """The bound of `matmul` for the first two operands; inf where their size is not bounded."""
    left, right = call.operand_shapes
    rows, inner, columns = left[-2] if len(left) > 1 else 1, left[-1], right[-1]
    if call.norm == 2:
        sizes = [_matrix(call, 0), _matrix(call, 1)]
    else:
        counts = (inner, inner) if math.isinf(call.norm) else (rows, columns)
        sizes = [m.entry * float(count) for m, count in zip(call.magnitudes, counts, strict=True)]
    batch = math.prod(call.node.shape[:-2])
    total = Upward.of(0.0)
    for position, size in ((1, sizes[0]), (0, sizes[1])):
        own = math.prod(call.operand_shapes[position][:-2])
        copies = Upward.of(1.0 if math.isinf(call.norm) else float(max(1, batch // max(1, own))))
        total = total + size * call.operands[position] * (
            copies if call.norm == 1 else copies.square_root()
        )
    return total


@rule(
    "aten.matmul",
    "aten.bmm",
    supports=_matmul_supported,
    product=lambda node: True,
    error=lambda *operands: _error_matmul(*operands),  # noqa: PLW0108 (defined below)
    magnitude=lambda call: Magnitude(entry=call.magnitudes[0].row * _matrix(call, 1)),
    leading=True,
    parameter_errors="read",
)
def matmul(call: Call) -> Upward:
    """``||A B||: L <= ||A||_F L(B) + ||B||_F L(A)`` for p = 2, the largest matrix of each operand.

    p = inf, with k columns of A: ``k (sup |A| L(B) + sup |B| L(A))``; p = 1 with n rows of A and m
    columns of B: ``n sup |A| L(B) + m sup |B| L(A)``. An operand that is the same for several
    matrices of the other counts once for each: ``sqrt(copies)`` for p = 2, the number for p = 1.
    """
    return _finite(call, product_of_matrices(call))


def _error_matmul(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """Operands as matrices (networks, samples, ...): parameters in all samples, vectors as one.

    A parameter may have a dimension of one where the samples stand.
    """
    operands = [
        (arguments.value(argument), isinstance(argument, Reference) and argument.kind == "node")
        for argument in arguments.node.args[:2]
    ]
    vectors = [not active and value.dim() == 2 for value, active in operands]
    rank = output.dim() + sum(vectors)
    matrices, known = [], []
    for axis, (value, active), vector, error in zip(
        (-2, -1), operands, vectors, errors, strict=True
    ):
        matrix = value.unsqueeze(axis) if vector else value
        ones = [] if active else [1] * (rank - matrix.dim())
        shape = (matrix.shape[0], *ones, *matrix.shape[1:])
        matrices.append(matrix.reshape(shape))
        known.append(None if error is None else error.reshape(shape))
    total = error_of_matmul(matrices[0], matrices[1], known[0], known[1])
    for axis, vector in zip((-2, -1), vectors, strict=True):
        total = total.squeeze(axis) if vector else total
    return total


def _power_supported(node: Node) -> str | None:
    exponent = node.argument(1, "exponent")
    whole = isinstance(exponent, (int, float)) and float(exponent).is_integer() and exponent >= 1
    return None if whole else f"with the exponent {exponent}"


def _error_power(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    n = arguments.node.number(1, "exponent", 1.0)
    x = arguments.value(arguments.node.args[0]).abs()
    e = torch.zeros_like(x) if errors[0] is None else errors[0]
    wide = widened(x + e, 2)
    total = n * wide ** (n - 1) * e + output.abs() * (64 + 4 * n) * UNIT_ROUNDOFF
    # No count of roundings: exponents may be beyond what `widened` takes.
    return total * (1.0 + (64 + 4 * n) * UNIT_ROUNDOFF) + UNDERFLOW


@rule(
    "aten.pow",
    supports=_power_supported,
    product=lambda node: node.number(1, "exponent", 1.0) != 1.0,
    error=_error_power,
    magnitude=lambda call: Magnitude(entry=_raised(call, 0)),
)
def power_of_activation(call: Call) -> Upward:
    """``x^n``: ``n sup |x|^(n-1)``; for n = 1 the identity."""
    exponent = int(call.node.number(1, "exponent", 1.0))
    if exponent == 1:
        return call.input
    slope = _raised(call, 1) * float(exponent)
    return _finite(call, slope) if slope.unbounded else call.input * slope


def _raised(call: Call, less: int) -> Upward:
    total = Upward.of(1.0)
    for _ in range(int(call.node.number(1, "exponent", 1.0)) - less):
        total = total * call.magnitudes[0].entry
    return total
