r"""The rule of residual layers ``x + A s(B x + c)`` with slopes between 0 and 1.

For two inputs with the difference d, the outputs of s differ by e with
$e^T T (B d - e) \ge 0$ for every diagonal $T \ge 0$ (Fazlyab et al., 2019). So
$\|d + A e\|^2 \le \|d\|^2 + 2 d^T R e - e^T S e$ with $R = A + B^T T$ and $S = 2 T - A^T A$. Let
$\theta = \|A (2T)^{-1/2}\|^2 < 1$. Then $e^T S e \ge (1 - \theta) \|(2T)^{1/2} e\|^2$, and the
right side is at most $(1 + q^2 / (1 - \theta)) \|d\|^2$ with $q = \|R (2T)^{-1/2}\|$. Where A is
$-B^T T$, as in layers that are 1-Lipschitz by construction (Meunier et al., 2022; Araujo et al.,
2023), R is 0 and nothing but $\theta \le 1$ is left to prove.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lipfast.graph.nodes import Argument, Node, Reference
from lipfast.ops.spectral_norms import spectral_norms
from lipfast.rounding import UNDERFLOW, UNIT_ROUNDOFF, WIDE
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.pointwise import SOFTPLUS_THRESHOLD
from lipfast.rules.registry import Call, rule, rule_of, written_here
from lipfast.rules.upward import Upward

_NORMS_RTOL = 1e-10
# T is taken this much larger than where theta = 1: (1 + _MARGIN) is what it costs.
_MARGIN = 1e-8
_MONOTONE = frozenset(
    f"aten.{name}"
    for name in (
        *("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "tanh", "sigmoid"),
        *("hardsigmoid", "atan", "softshrink"),
    )
)


def has_slopes_below_one(node: Node) -> bool:
    """Whether a node is a pointwise function whose slopes lie between 0 and 1."""
    if len(node.names("node")) != 1 or not written_here(rule_of(node.op)):
        return False
    if node.op == "aten.leaky_relu":
        return 0.0 <= node.number(1, "negative_slope", 0.01) <= 1.0
    if node.op == "aten.softplus":
        ideal = node.number(2, "threshold", 20.0) >= SOFTPLUS_THRESHOLD
        return ideal and node.number(1, "beta", 1.0) > 0.0
    return node.op in _MONOTONE or node.op == "lipfast.softsign"


def residual_layer(node: Node, layer: tuple[Argument, ...]) -> Node:
    """The node that adds, with what it adds.

    Args:
        node: a sum of two activations.
        layer: which of them is x; B, and whether it is stored transposed; scalings between s and A;
            scalings by one number after A; A, and whether it is stored transposed.
    """
    return replace(node, op="lipfast.residual", args=(node.op, *node.args, layer))


def _layer(call: Call) -> tuple[Argument, ...]:
    """The position of x, B, scalings before and after A, A: see `residual_layer`."""
    return cast("tuple[Argument, ...]", call.node.args[-1])


def _as_sum(call: Call) -> Call:
    """The call of the sum alone."""
    node = replace(call.node, op=str(call.node.args[0]), args=call.node.args[1:-1])
    count = len(list(node.references()))
    return replace(
        call,
        node=node,
        operands=call.operands[:count],
        operand_shapes=call.operand_shapes[:count],
        magnitudes=call.magnitudes[:count],
    )


def _magnitude_of_sum(call: Call) -> Magnitude:
    size = rule_of(str(call.node.args[0])).magnitude
    return Magnitude() if size is None else size(_as_sum(call))


@rule("lipfast.residual", magnitude=_magnitude_of_sum, parameter_errors="read")
def residual(call: Call) -> Upward:
    """The sum of both branches, or for p = 2 the bound of this module, if that is smaller.

    Stands for a node in graphs that bounds are computed on; it is never evaluated.
    """
    inner = _as_sum(call)
    total = rule_of(inner.node.op).bound(inner)
    total = total if isinstance(total, Upward) else Upward.of(total)
    # Where one branch alone is asked for, what it adds is the answer.
    if call.norm != 2 or any(constant.mantissa == 0.0 for constant in inner.operands):
        return total
    factor = _factor(call)
    if factor is None:
        return total
    together = inner.operands[int(cast(int, _layer(call)[0]))] * factor
    return min(total, together, key=lambda constant: constant.log)


class _Rounded:
    """A float64 tensor and a bound of the errors of its entries."""

    def __init__(self, value: Tensor, error: Tensor) -> None:
        self.value, self.error = value, error

    def times(self, other: _Rounded) -> _Rounded:
        value = self.value * other.value
        error = self.error * other.value.abs() + (self.value.abs() + self.error) * other.error
        return _Rounded(value, (error + value.abs() * UNIT_ROUNDOFF) * WIDE + UNDERFLOW)

    def norm(self) -> Upward:
        """A certified bound of the spectral norm."""
        found = spectral_norms([self.value], rtol=_NORMS_RTOL)
        spread = float(torch.linalg.matrix_norm(self.error)) * WIDE
        return Upward.of(float(found.upper[0])) + Upward.of(spread)


def _with_error(call: Call, argument: Argument) -> _Rounded:
    if not isinstance(argument, Reference):
        number = torch.tensor(float(cast(float, argument)), dtype=torch.float64, device="cpu")
        return _Rounded(number, torch.zeros_like(number))
    value = call.tensor(argument).detach().double().cpu()
    error = call.rounding(argument)
    return _Rounded(value, torch.zeros_like(value) if error is None else error.double().cpu())


def _matrix_of(call: Call, stored: tuple[Argument, ...]) -> _Rounded:
    """A matrix (out, in)."""
    weight, transposed = stored
    found = _with_error(call, weight)
    return _Rounded(found.value.mT, found.error.mT) if transposed else found


def _scaled_matrices(call: Call) -> tuple[_Rounded, _Rounded] | None:
    """A with its scalings, and B, without units that A does not read."""
    _, inner, before, after, outer = cast("tuple[tuple[Argument, ...], ...]", _layer(call))
    a, b = _matrix_of(call, outer), _matrix_of(call, inner)
    for index, scaling in enumerate((*before, *after)):
        factor = _with_error(call, scaling)
        count = factor.value.numel()
        columns = factor.value.shape[-1:] == (count,) == a.value.shape[1:]
        if count != 1 and not (columns and index < len(before)):
            return None
        a = a.times(_Rounded(factor.value.reshape(-1), factor.error.reshape(-1)))
    if not bool(torch.isfinite(a.value).all() & torch.isfinite(b.value).all()):
        return None
    live = (a.value != 0).any(0) | (a.error != 0).any(0)
    return _Rounded(a.value[:, live], a.error[:, live]), _Rounded(b.value[live], b.error[live])


def _factor(call: Call) -> Upward | None:
    """``sqrt(1 + q^2 / (1 - theta))`` for some T; None where none is found."""
    found = _scaled_matrices(call)
    if found is None or found[0].value.numel() == 0:
        return None
    a, b = found
    t = -(a.value * b.value.mT).sum(0) / b.value.square().sum(1)
    if not bool((torch.isfinite(t) & (t > 0)).all()):
        return None
    excess = _theta(a, t).value - 1.0
    t = t * (1.0 + max(2.0 * excess, 0.0) + (_MARGIN if excess > -_MARGIN else 0.0))
    left = 1.0 - _theta(a, t).value if math.isfinite(excess) else 0.0
    return _of_residue(a, b, t, left) if left > 0.0 else None


def _of_residue(a: _Rounded, b: _Rounded, t: Tensor, left: float) -> Upward:
    """The factor for 1 - theta = `left`, but for its rounding: R = A + B^T T, whatever T is."""
    added = _Rounded(b.value.mT, b.error.mT).times(_Rounded(t, torch.zeros_like(t)))
    value = a.value + added.value
    error = (a.error + added.error + value.abs() * UNIT_ROUNDOFF) * WIDE
    q = _scaled(_Rounded(value, error), t).norm()
    quotient = math.nextafter(1.0 / math.nextafter(left, 0.0), math.inf)
    return (q * q * quotient + 1.0).square_root()


def _scaled(matrix: _Rounded, t: Tensor) -> _Rounded:
    """``M (2T)^(-1/2)``: the root and the quotient are rounded."""
    scale = 1.0 / (2.0 * t).sqrt()
    return matrix.times(_Rounded(scale, scale * (4 * UNIT_ROUNDOFF)))


def _theta(a: _Rounded, t: Tensor) -> Upward:
    norm = _scaled(a, t).norm()
    return norm * norm
