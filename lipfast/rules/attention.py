"""Rules of what attention is made of: softmax and its kin, scaled dot-product attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lipfast.graph.nodes import Node, Reference
from lipfast.rounding import UNIT_ROUNDOFF, widened
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.pooling import power, reduced_count
from lipfast.rules.products import product_of_matrices
from lipfast.rules.registry import Arguments, Call, Errors, rule
from lipfast.rules.running_errors import EVALUATION_ROUNDOFFS, error_of_matmul, finished
from lipfast.rules.upward import Upward


def _over_entries(node: Node) -> str | None:
    dimensions = node.dimensions(1, "dim")
    return "over the samples" if not dimensions or 0 in dimensions else None


def _joint_axes(node: Node) -> list[int]:
    """The dimensions of (networks, samples, *shape) that are taken together."""
    return [dim + 1 for dim in node.dimensions(1, "dim")]


def _roundings(x: Tensor, axes: list[int]) -> Tensor:
    """Unit roundoffs in ``exp(x - max)`` and in sums of them, as torch evaluates them.

    ``x - max`` is rounded, which the exponential turns into a relative error; the exponential has
    `EVALUATION_ROUNDOFFS` (assumed), a sum of n terms n more.
    """
    count = math.prod(x.shape[axis] for axis in axes)
    low = torch.where(x == -math.inf, math.inf, x).amin(axes, keepdim=True)  # of what is not masked
    span = (x.amax(axes, keepdim=True) - low).clamp_max(800.0)
    return span + (2.0 * EVALUATION_ROUNDOFFS + count + 8)


def _error_softmax(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _joint_axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    rounding = output * (2 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = 0.5 * incoming.amax(axes, keepdim=True) + rounding
    return finished(total, 8)


def _softmax_magnitude(call: Call) -> Magnitude:
    last = call.node.dimensions(1, "dim") == (len(call.node.shape),)
    return Magnitude(Upward.of(1.0), Upward.of(1.0) if last else Upward(math.inf))


_softmax_rule = partial(
    rule, supports=_over_entries, dimensions={1: "dim"}, casts=True, leading=True, maskable=True
)


@_softmax_rule("aten.softmax", error=_error_softmax, magnitude=_softmax_magnitude)
def softmax(call: Call) -> Upward:
    """1/2 for p = 1, 2 and inf.

    The Jacobian ``diag(s) - s s^T`` is symmetric; its rows sum to ``2 s_i (1 - s_i) <= 1/2`` in
    magnitude, which bounds the norms 1 and inf and, between them, 2. (Over a single entry: 0.)
    """
    return call.input * (0.0 if reduced_count(call.node, call.operand_shapes[0]) == 1 else 0.5)


def _error_log_softmax(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _joint_axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    size = x.abs().amax(axes, keepdim=True) + output.abs() + 1.0
    rounding = size * (4 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = incoming + incoming.amax(axes, keepdim=True) + rounding
    return finished(total, 8)


@_softmax_rule("aten.log_softmax", error=_error_log_softmax)
def log_softmax(call: Call) -> Upward:
    """Over K >= 2 entries ``sqrt(K)`` for p = 2, 2 for p = inf, K - 1 for p = 1.

    The Jacobian is ``I - 1 s^T`` with ``1^T s = 1``. Row i sums to ``2 (1 - s_i)``, column j to
    ``1 + (K - 2) s_j``. As a projection that is neither 0 nor I it has the norm of its complement,
    ``||1 s^T|| = sqrt(K) ||s|| <= sqrt(K)``.
    """
    count = reduced_count(call.node, call.operand_shapes[0])
    if count == 1:
        return Upward.of(0.0)
    if math.isinf(call.norm):
        return call.input * 2.0
    return call.input * (power(count, 2) if call.norm == 2 else Upward.of(float(count - 1)))


def _error_logsumexp(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    x, axes = arguments.value(arguments.node.args[0]), _joint_axes(arguments.node)
    incoming = torch.zeros_like(x) if errors[0] is None else errors[0]
    size = x.abs().amax(axes, keepdim=True) + 1.0
    rounding = size * (4 * UNIT_ROUNDOFF) * _roundings(x, axes)
    total = (incoming.amax(axes, keepdim=True) + rounding).reshape(output.shape)
    return finished(total + output.abs() * (4 * UNIT_ROUNDOFF), 8)


@rule(
    "aten.logsumexp",
    supports=_over_entries,
    error=_error_logsumexp,
    dimensions={1: "dim"},
    leading=True,
)
def logsumexp(call: Call) -> Upward:
    """1 in every norm: the gradient is a softmax, of non-negative entries that sum to 1."""
    return call.input


def _weighted_rows_magnitude(call: Call) -> Magnitude:
    """Rows are averages of rows of V."""
    size = call.magnitudes[1]
    return Magnitude(entry=size.entry, row=size.row)


@rule(
    "lipfast.weighted_rows",
    evaluate=lambda arguments: _evaluate_weighted(arguments),  # noqa: PLW0108 (defined below)
    error=lambda arguments, errors, output: _error_weighted(arguments, errors),
    product=lambda node: True,
    magnitude=_weighted_rows_magnitude,
)
def weighted_rows(call: Call) -> Upward:
    """``S V`` with ``S = softmax(c Q K^T + constants)``: attention that is written out.

    The smaller of two bounds: that of `attention`, which the constants do not change (a softmax
    of shifted scores is another set of weights, and the proof takes any), and that of a product of
    matrices, `products.matmul`.
    """
    weights, value, query, key = call.operands
    pair = replace(
        call,
        operands=(weights, value),
        operand_shapes=call.operand_shapes[:2],
        magnitudes=call.magnitudes[:2],
    )
    plain = product_of_matrices(pair)
    if call.norm != 2:
        return plain if not plain.unbounded else call.unbounded(_UNBOUNDED.format(call.node.op))
    scale = widened(abs(call.node.number(4, "scale", 1.0)), 16)
    rows = tuple(call.magnitudes[index].row for index in (2, 3, 1))
    joint = _attention_bound((query, key, value), rows, call.node.shape[-2], scale)
    best = min(plain, joint, key=lambda bound: bound.log)
    return best if not best.unbounded else call.unbounded(_UNBOUNDED.format(call.node.op))


def _evaluate_weighted(arguments: Arguments) -> Tensor:
    weights, value = (arguments.value(argument) for argument in arguments.node.args[:2])
    return weights @ value


def _error_weighted(arguments: Arguments, errors: Errors) -> Tensor:
    weights, value = (arguments.value(argument) for argument in arguments.node.args[:2])
    return error_of_matmul(weights, value, errors[0], errors[1])


_UNBOUNDED = (
    "{} has no constant unless its rows are bounded, for instance by a normalisation before it or "
    "an input domain"
)


def _attention_bound(
    constants: tuple[Upward, Upward, Upward],
    rows: Sequence[Upward],
    queries: int,
    scale: float,
) -> Upward:
    """The bound of `attention`, of the constants and the largest rows of Q, K and V."""
    query, key, value = rows
    root = Upward.of(float(queries)).square_root()
    half = Upward.of(queries / 2.0).square_root()
    return (
        value * key * scale * constants[0]
        + value * query * scale * half * constants[1]
        + root * constants[2]
    )


def _attention_supported(node: Node) -> str | None:
    operands = node.args[:3]
    if not all(isinstance(v, Reference) and v.kind == "node" for v in operands):
        return "of parameters"
    mask = node.argument(3, "attn_mask")
    if mask is not None and not (isinstance(mask, Reference) and mask.kind != "node"):
        return "with a computed mask"
    if node.number(4, "dropout_p", 0.0) != 0.0:
        return "with dropout"
    return None


def _per_query_head(node: Node, query: Tensor, other: Tensor) -> Tensor:
    """Keys or values (or their errors) for every head of queries: each serves a group of them."""
    if node.argument(7, "enable_gqa") is not True:
        return other
    return other.repeat_interleave(query.shape[-3] // other.shape[-3], -3)


def _attention_scale(node: Node, features: int) -> float:
    given = node.argument(6, "scale")
    return float(given) if isinstance(given, (int, float)) else 1.0 / math.sqrt(features)


def _for_all_samples(table: Tensor, scores: Tensor) -> Tensor:
    """(networks, 1..., *shape), to meet scores of (networks, samples, ...)."""
    ones = [1] * (scores.dim() - table.dim())
    return table.reshape(table.shape[0], *ones, *table.shape[1:])


def _masked_scores(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, the masked scores, and which of them a mask leaves visible."""
    node = arguments.node
    query, *others = (arguments.value(argument) for argument in node.args[:3])
    key, value = (_per_query_head(node, query, other) for other in others)
    scores = (query @ key.mT) * _attention_scale(node, query.shape[-1])
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    mask = node.argument(3, "attn_mask")
    if mask is not None:
        table = _for_all_samples(arguments.value(mask), scores)
        if table.dtype == torch.bool:
            hidden = hidden | ~table
        else:
            scores = scores + table
            hidden = hidden | (table == -math.inf)
    if node.argument(5, "is_causal") is True:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        hidden = hidden | later
    return query, key, value, scores.masked_fill(hidden, -math.inf), ~hidden


def _evaluate_attention(arguments: Arguments) -> Tensor:
    _, _, value, scores, _ = _masked_scores(arguments)
    return scores.softmax(-1) @ value


def _error_attention(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """Running errors of the scores, the softmax (half of the largest in a row), the product."""
    query, key, value, scores, visible = _masked_scores(arguments)
    scale = abs(_attention_scale(arguments.node, query.shape[-1]))
    of_keys, of_values = (
        None if error is None else _per_query_head(arguments.node, query, error)
        for error in errors[1:3]
    )
    of_key = None if of_keys is None else of_keys.mT
    size = torch.where(visible, scores.abs(), 0.0)
    first = error_of_matmul(query, key.mT, errors[0], of_key) * widened(scale, 4)
    # The product with the scale, which is rounded too, and the sum with a mask.
    magnitude = (query.abs() @ key.abs().mT) * scale
    first = first + (8 * UNIT_ROUNDOFF) * (magnitude + size)
    if len(errors) > 3 and errors[3] is not None:  # of a mask that is computed
        first = widened(first + _for_all_samples(errors[3], scores), 2)
    first = torch.where(visible, first, 0.0)
    weights = scores.softmax(-1)
    low = torch.where(visible, scores, math.inf).amin(-1, keepdim=True)
    span = (scores.amax(-1, keepdim=True) - low).clamp(0.0, 800.0)
    roundings = span + (2.0 * EVALUATION_ROUNDOFFS + scores.shape[-1] + 8)
    second = 0.5 * first.amax(-1, keepdim=True) + weights * (2 * UNIT_ROUNDOFF) * roundings
    second = finished(second, 8)
    return error_of_matmul(weights, value, second, of_values)


def _for_all_heads(call: Call, position: int) -> Upward:
    """The constant of an operand with all the copies that broadcasting makes of it."""
    heads = math.prod(call.node.shape[:-2])
    own = math.prod(call.operand_shapes[position][:-2])
    copies = Upward.of(float(max(1, heads // max(1, own))))
    return call.operands[position] * copies.square_root()


@rule(
    "aten.scaled_dot_product_attention",
    supports=_attention_supported,
    evaluate=_evaluate_attention,
    error=_error_attention,
    product=lambda node: True,
    magnitude=lambda call: Magnitude(row=call.magnitudes[2].row),
    leading=True,
    integers=True,
    parameter_errors="read",
    maskable=True,
)
def attention(call: Call) -> Upward:
    r"""``softmax(c Q K^T) V``, p = 2: ``c R_v R_k L(Q) + c R_v R_q sqrt(n/2) L(K) + sqrt(n) L(V)``.

    n queries; R bound the Euclidean norms of rows. No constant holds for all inputs (Kim,
    Papamakarios and Mnih, 2021), so without bounds on the rows the answer is inf.

    One row: $o = V^T s$ with $s = \mathrm{softmax}(c K q)$ and $J = \mathrm{diag}(s) - s s^T$.
    With $\bar v = V^T s$, $V^T J K = \sum_j s_j (v_j - \bar v)(k_j - \bar k)^T$ is a covariance, so
    $\|V^T J K\|_2 \le R_v R_k$ and a change of Q by dQ moves the rows by at most
    $c R_v R_k \|dQ\|_F$ together. $V^T J V \preceq R_v^2 I$ and $\|J\|_2 \le 1/2$, so
    $\|V^T J\|_2 \le R_v/\sqrt 2$, and a change of K moves each of the n rows by at most
    $c R_v R_q \|dK\|_F/\sqrt 2$. A change of V moves them by $\|S\|_2 \|dV\|_F$ with
    $\|S\|_2^2 \le \|S\|_1 \|S\|_\infty \le n$. Masks only drop terms of these sums. Heads act
    on entries of their own, so the largest of each coefficient holds for all. An operand that
    serves several heads (one set of keys for all, or for a group) is copied to each: its constant
    counts $\sqrt{\text{copies}}$ times.
    """
    queries = call.node.shape[-2]
    if call.norm != 2:
        return call.unbounded(f"{call.node.op} has a rule for the norm 2 only")
    if len({len(shape) for shape in call.operand_shapes[:3]}) > 1:
        return call.unbounded(f"{call.node.op} of tensors with different numbers of dimensions")
    features = call.operand_shapes[0][-1]
    scale = widened(abs(_attention_scale(call.node, features)), 2)
    first, second, third = (_for_all_heads(call, position) for position in range(3))
    rows = tuple(size.row for size in call.magnitudes[:3])
    total = _attention_bound((first, second, third), rows, queries, scale)
    return total if not total.unbounded else call.unbounded(_UNBOUNDED.format(call.node.op))
