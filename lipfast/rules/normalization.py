"""Rules of normalisations: by stored statistics (an affine map) or by those of the sample."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from lipfast.graph.apply import named_argument
from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.rounding import SMALLEST, UNDERFLOW, UNIT_ROUNDOFF, gamma, widened
from lipfast.rules.magnitude import Magnitude, of_tensor
from lipfast.rules.registry import Arguments, Call, Errors, rule, rule_of
from lipfast.rules.running_errors import finished
from lipfast.rules.upward import Upward


def running_statistics(
    node: Node,
) -> tuple[Reference | None, Reference | None, Reference | None, Reference | None, float]:
    """Weight, bias, mean, variance and eps of a normalisation by stored statistics."""
    weight, bias, mean, variance = (
        node.operand(position, name)
        for position, name in enumerate(("weight", "bias", "running_mean", "running_var"), 1)
    )
    return weight, bias, mean, variance, node.number(7, "eps", 1e-5)


def _stored_supported(node: Node) -> str | None:
    stored = node.operand(3, "running_mean") and node.operand(4, "running_var")
    if node.op == "aten.batch_norm" and not stored:
        return "without running statistics it mixes the samples of a batch"
    if len(node.shape) < 1:
        return "on samples without channels"
    kinds = [ref.kind for ref in node.references()]
    known = kinds.count("node") == 1 and set(kinds) <= {"node", "parameter", "constant"}
    return None if known else "with computed statistics or weights"


def _by_sample(node: Node) -> bool:
    return node.op == "aten.instance_norm" and node.argument(5, "use_input_stats") is True


def _channels(arguments: Arguments, argument: Argument) -> Tensor | None:
    """(networks, 1, channels, 1...), ready to meet an activation."""
    if not isinstance(argument, Reference):
        return None
    value = arguments.value(argument)
    rank = len(arguments.node.shape)
    return value.reshape(value.shape[0], 1, -1, *[1] * (rank - 1))


def _scale(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(weight / sqrt(var + eps), mean, bias)``."""
    weight, bias, mean, variance, eps = running_statistics(arguments.node)
    spread = _channels(arguments, variance)
    centre = _channels(arguments, mean)
    assert spread is not None
    assert centre is not None
    scale = (spread + eps).sqrt()
    factor = _channels(arguments, weight)
    scale = scale.reciprocal() if factor is None else factor / scale
    return scale, centre, _channels(arguments, bias)


def _evaluate_stored(arguments: Arguments) -> Tensor:
    x = arguments.value(arguments.node.args[0])
    if _by_sample(arguments.node):
        return _evaluate_by_sample(arguments)
    scale, centre, bias = _scale(arguments)
    z = (x - centre) * scale
    return z if bias is None else z + bias


def _error_stored(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """``|s| (e + 6 u |x - mean|) + u |z|``: s has three roundings, the product and shift three.

    A denormal s is off by up to 2^-1075, whatever its size: that times ``|x - mean| + e``.
    """
    if _by_sample(arguments.node):
        return _error_by_sample(arguments, errors, output)
    x = arguments.value(arguments.node.args[0])
    scale, centre, _ = _scale(arguments)
    distance = (x - centre).abs()
    spread = distance * (8 * UNIT_ROUNDOFF) + SMALLEST  # it may underflow, and s be huge
    incoming = spread if errors[0] is None else widened(errors[0], 4) + spread
    total = incoming * scale.abs() + (distance + incoming) * SMALLEST
    total = total + output.abs() * UNIT_ROUNDOFF
    return finished(total, 8)


def _largest(call: Call, argument: Argument) -> float:
    """Largest magnitude of a weight; 1 where there is none."""
    if not isinstance(argument, Reference):
        return 1.0
    return float(call.tensor(argument).detach().abs().double().max())


def _stored_constant(call: Call) -> Upward:
    """``max |weight| / sqrt(var + eps)``, rounded up."""
    weight, _, _, variance, eps = running_statistics(call.node)
    spread = call.tensor(variance).detach().double() + eps
    if float(spread.min()) <= 0.0:
        return call.unbounded(f"{call.node.op}: a running variance is not above -eps")
    scale = spread.sqrt().reciprocal()
    if isinstance(weight, Reference):
        scale = scale * call.tensor(weight).detach().double().abs()
    # Four roundings of half an ulp or more each, and room for a denormal product.
    return widened(Upward.of(float(scale.max())), 4) + UNDERFLOW


_stored_rule = partial(
    rule, supports=_stored_supported, evaluate=_evaluate_stored, error=_error_stored
)


@_stored_rule("aten.batch_norm", training=5, affine="channels")
@_stored_rule("aten.instance_norm")
def stored_normalization(call: Call) -> Upward:
    """BatchNorm in eval mode: diagonal, ``max |weight| / sqrt(var + eps)`` in every norm.

    InstanceNorm with running statistics is the same map; without them it is a normalisation by
    the sample's own statistics, see `by_sample`.
    """
    if _by_sample(call.node):
        return _sample_constant(call) * call.input
    return _stored_constant(call) * call.input


def default_eps(node: Node) -> float | None:
    """The eps that follows from the dtype that a normalisation runs in; None if it was given.

    torch computes half precision in float32, and takes its eps.
    """
    position = rule_of(node.op).dtype_eps
    given = None if position is None else node.argument(position, "eps")
    if not isinstance(given, Reference) or given.kind != "dtype":
        return None
    double = given.name == "float64"
    return torch.finfo(torch.float64 if double else torch.float32).eps


class _SampleGroups:
    """Which entries a normalisation by the sample's statistics takes together."""

    def __init__(self, node: Node) -> None:
        op, shape = node.op, node.shape
        eps = named_argument(node, "eps")
        default = default_eps(node)
        self.eps = default or (float(eps) if isinstance(eps, (int, float)) else 0.0)
        self.weight, self.bias = named_argument(node, "weight"), named_argument(node, "bias")
        self.centred = op != "aten.rms_norm"
        if op in ("aten.layer_norm", "aten.rms_norm"):
            axes = node.argument(1, "normalized_shape")
            assert isinstance(axes, tuple)
            self.size = math.prod(shape[len(shape) - len(axes) :])
            self.weight_shape = shape[len(shape) - len(axes) :]
        else:
            instances = op == "aten.instance_norm"
            groups = shape[0] if instances else int(node.number(1, "num_groups", 1))
            self.size = math.prod(shape) // groups
            self.weight_shape = (shape[0], *[1] * (len(shape) - 1))


def _sample_supported(node: Node) -> str | None:
    if node.op == "aten.group_norm" and not isinstance(node.argument(1, "num_groups"), int):
        return "without a number of groups"
    axes = node.argument(1, "normalized_shape")
    whole = isinstance(axes, tuple) and len(axes) > len(node.shape)
    if node.op in ("aten.layer_norm", "aten.rms_norm") and whole:
        return "over the samples"
    kinds = [ref.kind for ref in node.references() if ref.kind != "dtype"]
    known = kinds.count("node") == 1 and set(kinds) <= {"node", "parameter", "constant"}
    return None if known else "with a computed weight"


def _in_groups(x: Tensor, size: int) -> Tensor:
    """(networks, samples, groups, size)."""
    return x.reshape(*x.shape[:2], -1, size)


def _per_entry(arguments: Arguments, argument: Argument, groups: _SampleGroups) -> Tensor | None:
    if not isinstance(argument, Reference):
        return None
    value = arguments.value(argument)
    rank = len(arguments.node.shape)
    shape = (1,) * (rank - len(groups.weight_shape)) + tuple(groups.weight_shape)
    return value.reshape(value.shape[0], 1, *shape)


def _evaluate_by_sample(arguments: Arguments) -> Tensor:
    groups = _SampleGroups(arguments.node)
    x = arguments.value(arguments.node.args[0])
    rows = _in_groups(x, groups.size)
    if groups.centred:
        rows = rows - rows.mean(-1, keepdim=True)
    z = (rows / (rows.square().mean(-1, keepdim=True) + groups.eps).sqrt()).reshape(x.shape)
    weight = _per_entry(arguments, groups.weight, groups)
    bias = _per_entry(arguments, groups.bias, groups)
    z = z if weight is None else z * weight
    return z if bias is None else z + bias


def _error_by_sample(arguments: Arguments, errors: Errors, output: Tensor) -> Tensor:
    """Running errors of the centred entries c, of ``s = mean(c^2) + eps`` and of ``c / sqrt(s)``.

    With errors d of c and t of s, and ``s - t`` (at least eps) a lower bound of the true s:
    ``|c' / sqrt s' - c / sqrt s| <= d / sqrt s' + |c| t / (sqrt(s s') (sqrt s + sqrt s'))``.
    """
    groups, u = _SampleGroups(arguments.node), UNIT_ROUNDOFF
    x = _in_groups(arguments.value(arguments.node.args[0]), groups.size)
    n, wide = groups.size, gamma(groups.size + 8)
    e = torch.zeros_like(x) if errors[0] is None else _in_groups(errors[0], n)
    c, d = x, e
    if groups.centred:
        c = x - x.mean(-1, keepdim=True)
        d = e + (e + x.abs() * wide).mean(-1, keepdim=True) * (1 + wide) + c.abs() * (2 * u)
        d = d + 8 * SMALLEST  # a denormal mean is divided by a root that may be as small as 2^-537
    s = c.square().mean(-1, keepdim=True) + groups.eps
    t = (d * (2 * c.abs() + d)).mean(-1, keepdim=True) * (1 + 2 * wide) + s * (2 * wide)
    t = t + 8 * SMALLEST  # squares, their mean and t itself may underflow, and eps be as small
    low = torch.maximum(s - widened(t, 2), torch.full_like(s, groups.eps)) * (1 - 4 * u)
    root, least = s.sqrt(), low.sqrt() * (1 - 4 * u)
    unit = (c / root).abs()
    # In this order: no factor underflows before the last.
    spread = d / least + unit * (t / least / (root + least)) + unit * 4 * u
    spread = finished(spread.reshape(output.shape), 16)
    weight = _per_entry(arguments, groups.weight, groups)
    if weight is not None:
        spread = spread * weight.abs()
    # The product and the sum with the bias: |product| <= |z| + |bias|.
    bias = _per_entry(arguments, groups.bias, groups)
    size = output.abs() if bias is None else 2 * output.abs() + bias.abs()
    return finished(spread + size * (2 * u), 8)


_sample_rule = partial(
    rule,
    supports=_sample_supported,
    evaluate=_evaluate_by_sample,
    error=_error_by_sample,
    magnitude=lambda call: _normalised_magnitude(call),  # noqa: PLW0108 (defined below)
)


@_sample_rule("aten.layer_norm", leading=True)
@_sample_rule("aten.rms_norm", leading=True, dtype_eps=3)
@_sample_rule("aten.group_norm")
def by_sample(call: Call) -> Upward:
    r"""LayerNorm, GroupNorm, InstanceNorm, RMSNorm: ``max |weight| / sqrt(eps)`` for p = 2.

    Over n entries, with $P = I - 11^T/n$ (RMSNorm: $P = I$), $s = \sqrt{\|Px\|^2/n + \epsilon}$,
    $\hat x = Px/s$ and $r = \|\hat x\|/\sqrt n < 1$, the Jacobian is
    $(P - \hat x \hat x^T/n)/s$ and $1/s = \sqrt{1 - r^2}/\sqrt\epsilon$.

    p = 2: its eigenvalues are 0, 1/s and (1 - r^2)/s, so at most $1/\sqrt\epsilon$.

    p = 1, inf (it is symmetric): let $\hat x_i = \sqrt n\, r \cos\theta$, so that
    $\sum_{j \ne i}|\hat x_j| \le \sqrt{n - 1}\sqrt n\, r \sin\theta$. Row i of $s J$ sums to at
    most $A - \hat x_i^2/n + |\hat x_i|\sum_{j \ne i}|\hat x_j|/n \le A + r^2(\sqrt n - 1)/2$,
    where A is $2(1 - 1/n)$, the row sum of $|P|$ (RMSNorm: 1). With $B = (\sqrt n - 1)/2$ the
    constant is the largest value of $\sqrt{1 - t}(A + Bt)$ on [0, 1], over $\sqrt\epsilon$.
    """
    return _sample_constant(call) * call.input


def _normalised_magnitude(call: Call) -> Magnitude:
    """``||P x / s|| <= sqrt(n)`` and ``|entry| <= sqrt(n - 1)`` (RMSNorm: sqrt(n)) per group."""
    if call.node.op == "aten.instance_norm" and not _by_sample(call.node):
        return Magnitude()
    groups = _SampleGroups(call.node)
    n = groups.size
    rows = math.prod(call.node.shape) // n
    factor = _largest(call, groups.weight)
    entry = Upward.of(float(n - 1 if groups.centred else n)).square_root() * factor
    group = Upward.of(float(n)).square_root() * factor
    total = group * Upward.of(float(rows)).square_root()
    own_row = n == call.node.shape[-1] and call.node.op in ("aten.layer_norm", "aten.rms_norm")
    found = Magnitude(entry, group if own_row else Upward(math.inf), total)
    if not isinstance(groups.bias, Reference):
        return found
    bias = of_tensor(call.tensor(groups.bias))
    shift = Magnitude(entry=bias.entry, row=bias.total if own_row else Upward(math.inf))
    return found.plus(shift.within(call.node.shape))


def _sample_constant(call: Call) -> Upward:
    groups = _SampleGroups(call.node)
    if groups.eps <= 0.0:
        return call.unbounded(f"{call.node.op} with eps = 0 has no finite Lipschitz constant")
    factor = Upward.of(_largest(call, groups.weight))
    # The quotient and the root: three roundings.
    factor = widened(factor * (1.0 / math.sqrt(groups.eps)), 2)
    if call.norm == 2:
        return factor * (0.0 if groups.centred and groups.size == 1 else 1.0)
    return factor * _row_sum(groups.size, groups.centred)


def _row_sum(count: int, centred: bool) -> float:
    """``max sqrt(1 - t) (A + B t)``: at t = 0, or at ``t = (2 a - 1) / (3 a)`` with a = B / A."""
    own = 2.0 * (count - 1) / count if centred else 1.0
    if own == 0.0:
        return 0.0
    ratio = (math.sqrt(count) - 1.0) / 2.0 / own
    if ratio > 0.5:
        own *= 2.0 * (ratio + 1.0) / 3.0 * math.sqrt((ratio + 1.0) / (3.0 * ratio))
    return widened(own, 16)
