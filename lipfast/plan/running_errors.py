"""Ops on parameters with elementwise bounds of their rounding errors, in float64.

Running error analysis (Higham, 2002, section 3.3): with x the computed operand and e the bound of
its error, every function here returns the computed result and a bound that holds for all true
operands within e of x. u is the unit roundoff.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lipfast.rules.rounding import SMALLEST, UNDERFLOW, UNIT_ROUNDOFF, gamma

u = UNIT_ROUNDOFF
# As in `lipfast.rules.pointwise`: assumed of torch's float64 elementary functions.
_EVALUATION = 32


@dataclass(frozen=True)
class Value:
    """A tensor, and an elementwise bound of its error (None: it is exact)."""

    tensor: Tensor
    error: Tensor | None = None


ErrorRule: TypeAlias = Callable[[Sequence[Any], Mapping[str, Any]], Value]
RULES: dict[str, ErrorRule] = {}


def rule(*names: str) -> Callable[[ErrorRule], ErrorRule]:
    """Register a function under ATen names (without their namespace)."""

    def register(function: ErrorRule) -> ErrorRule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return register


def _value(operand: object) -> Value:
    """An operand as float64; numbers of the code are exact."""
    if isinstance(operand, Value):
        tensor = operand.tensor
        return Value(tensor.double() if not tensor.is_floating_point() else tensor, operand.error)
    return Value(torch.as_tensor(operand, dtype=torch.float64, device="cpu"))


def _error(value: Value) -> Tensor:
    return torch.zeros_like(value.tensor) if value.error is None else value.error


def _widened(error: Tensor, roundings: int = 16) -> Tensor:
    return error * (1.0 + 2 * gamma(roundings)) + UNDERFLOW


def _finished(result: Tensor, error: Tensor, exact: Tensor) -> Value:
    """`error` where the result may be rounded, 0 where operands and result say it is not."""
    return Value(result, torch.where(exact, torch.zeros_like(error), _widened(error)))


def _whole(value: Value) -> Tensor:
    """Integers without errors: sums and products of them below 2^53 are exact."""
    return (value.tensor == value.tensor.round()) & (_error(value) == 0)


def _sum(operands: Sequence[Any], options: Mapping[str, Any], sign: float) -> Value:
    x, y = _value(operands[0]), _value(operands[1])
    alpha = float(options.get("alpha", operands[2] if len(operands) > 2 else 1.0)) * sign
    result = x.tensor + alpha * y.tensor
    error = _error(x) + abs(alpha) * _error(y)
    certain = error == 0
    error = error + 2 * u * result.abs()
    if abs(alpha) != 1.0:
        error = error + 2 * u * (alpha * y.tensor).abs()
    whole = _whole(x) & _whole(y) & (alpha == round(alpha)) & (result.abs() < 2.0**53)
    # A sum with 0, and a power of two times a number, are exact.
    scaled = math.frexp(abs(alpha))[0] == 0.5
    one_is_zero = ((x.tensor == 0) | (y.tensor == 0)) & scaled & (result.abs() > 2.0**-900)
    nothing = (x.tensor == 0) & (y.tensor == 0)
    return _finished(result, error, certain & (whole | one_is_zero | nothing))


@rule("add")
def _add(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x + alpha y``: ``e_x + |alpha| e_y + 2u |alpha y| + u |z|``."""
    return _sum(operands, options, 1.0)


@rule("sub", "rsub")
def _sub(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x - alpha y``, as for a sum."""
    return _sum(operands, options, -1.0)


@rule("mul")
def _mul(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x y``: ``|x| e_y + |y| e_x + e_x e_y + u |z|``."""
    x, y = _value(operands[0]), _value(operands[1])
    result = x.tensor * y.tensor
    error = x.tensor.abs() * _error(y) + (y.tensor.abs() + _error(y)) * _error(x)
    certain = (error == 0) & (
        (_whole(x) & _whole(y) & (result.abs() < 2.0**53)) | (x.tensor == 0) | (y.tensor == 0)
    )
    return _finished(result, error + 2 * u * result.abs(), certain)


@rule("div")
def _div(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x / y``: ``(e_x + |z| e_y) / (|y| - e_y) + 2 u |z|``; inf where y may be 0.

    Two roundings, and 2^-1074 |x|: on CUDA a number's reciprocal is multiplied with, which may be
    denormal.
    """
    if options.get("rounding_mode") is not None:
        return Value(torch.full((), math.nan, dtype=torch.float64, device="cpu"))
    x, y = _value(operands[0]), _value(operands[1])
    result = x.tensor / y.tensor
    least = (y.tensor.abs() - _error(y)) * (1.0 - 4 * u)
    error = (_error(x) + (result.abs() * (1 + 4 * u)) * _error(y)) / least
    error = error + 2 * u * result.abs() + x.tensor.abs() * SMALLEST
    error = torch.where(least > 0, error, math.inf)
    return _finished(result, error, torch.zeros_like(result, dtype=torch.bool))


@rule("reciprocal")
def _reciprocal(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``1 / x``."""
    return _div([1.0, operands[0]], {})


def _lipschitz(function: Callable[..., Tensor]) -> ErrorRule:
    """Nothing is rounded, and the result moves by no more than the operands."""

    def evaluate(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
        values = [operand for operand in operands if isinstance(operand, Value)]
        tensors = [
            _value(operand).tensor if isinstance(operand, Value) else operand
            for operand in operands
        ]
        result = function(*tensors, **options)
        errors = [_error(_value(value)) for value in values]
        largest = errors[0]
        for error in errors[1:]:
            largest = torch.maximum(largest, error)
        return Value(result, largest.expand_as(result).clone())

    return evaluate


_CONTRACTIONS: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "relu": torch.relu,
    "clamp": torch.clamp,
    "clamp_min": torch.clamp_min,
    "clamp_max": torch.clamp_max,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
for _name, _function in _CONTRACTIONS.items():
    RULES[f"aten.{_name}"] = _lipschitz(_function)


@rule("square")
def _square(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x^2`` as a product."""
    return _mul([operands[0], operands[0]], {})


@rule("sqrt")
def _sqrt(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``|sqrt x - sqrt x'| <= e / sqrt x`` and at most sqrt(e); inf where x - e is negative."""
    x = _value(operands[0])
    result, e = x.tensor.sqrt(), _error(x)
    moved = torch.where(result > 0, torch.minimum(e / (result * (1 - 4 * u)), e.sqrt()), e.sqrt())
    error = torch.where(x.tensor >= e, moved * (1 + 8 * u) + 2 * u * result, math.inf)
    return _finished(result, error, torch.zeros_like(result, dtype=torch.bool))


@rule("rsqrt")
def _rsqrt(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``1 / sqrt(x)``."""
    return _reciprocal([_sqrt(operands, {})], {})


@rule("exp")
def _exp(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``(exp(e) - 1) exp(x)``, and the evaluation's own rounding."""
    x = _value(operands[0])
    result = x.tensor.exp()
    error = torch.expm1(_error(x)) * result * (1 + 64 * u)
    error = error + result * (_EVALUATION * u) * (x.tensor.abs() + 2)
    return _finished(result, error, x.tensor != x.tensor)


def _smooth(function: Callable[..., Tensor], slope: float, offset: float) -> ErrorRule:
    """``sup |f'| e`` and the evaluation's own rounding."""

    def evaluate(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
        x = _value(operands[0])
        result = function(x.tensor)
        size = x.tensor.abs() + result.abs() + offset
        error = slope * _error(x) + size * (_EVALUATION * u)
        return _finished(result, error, x.tensor != x.tensor)

    return evaluate


RULES["aten.tanh"] = _smooth(torch.tanh, 1.0, 0.0)
RULES["aten.sigmoid"] = _smooth(torch.sigmoid, 0.25, 1.0)


@rule("softplus")
def _softplus(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``x`` where ``beta x > threshold``, else ``log(1 + exp(beta x)) / beta``, as torch has it.

    inf where ``beta x`` is so near to the threshold that rounding may choose the other branch.
    """
    x = _value(operands[0])
    beta = float(options.get("beta", operands[1] if len(operands) > 1 else 1.0))
    threshold = float(options.get("threshold", operands[2] if len(operands) > 2 else 20.0))
    scaled = x if beta == 1.0 else _mul([x, beta], {})
    log1p = _smooth(lambda y: torch.logaddexp(y, torch.zeros_like(y)), 1.0, 1.0)
    smooth = _div([log1p([scaled], {}), beta], {})
    linear = scaled.tensor > threshold
    error = torch.where(linear, _error(x), _error(smooth))
    # The difference of neighbours is exact, others are far from 0; the factor is to spare.
    near = (scaled.tensor - threshold).abs() <= _error(scaled) * (1 + 4 * u)
    unsure = near & (_error(scaled) > 0)
    return Value(torch.where(linear, x.tensor, smooth.tensor), torch.where(unsure, math.inf, error))


def _dims(operands: Sequence[Any], options: Mapping[str, Any], position: int) -> list[int] | None:
    given = options.get("dim", operands[position] if len(operands) > position else None)
    if given is None or given == ():
        return None
    return [given] if isinstance(given, int) else list(given)


def _keep(operands: Sequence[Any], options: Mapping[str, Any], position: int) -> bool:
    return bool(options.get("keepdim", operands[position] if len(operands) > position else False))


def _count(x: Tensor, dims: list[int] | None) -> int:
    return x.numel() if dims is None else math.prod(x.shape[dim] for dim in dims)


@rule("sum")
def _total(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """Over n terms: ``sum e + gamma_n sum |x|``."""
    x = _value(operands[0])
    dims, keep = _dims(operands, options, 1), _keep(operands, options, 2)
    axes = list(range(x.tensor.dim())) if dims is None else dims
    wide = gamma(_count(x.tensor, dims) + 2)
    result = x.tensor.sum(axes, keepdim=keep)
    error = (_error(x) + x.tensor.abs() * wide).sum(axes, keepdim=keep) * (1 + 4 * wide)
    return _finished(result, error, torch.zeros_like(result, dtype=torch.bool))


@rule("mean")
def _mean(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """The sum divided by n."""
    count = _count(_value(operands[0]).tensor, _dims(operands, options, 1))
    return _div([_total(operands, options), float(count)], {})


def _euclidean(x: Value, dims: list[int] | None, keep: bool) -> Value:
    """``| ||x|| - ||x'|| | <= ||e||``, and ``gamma_{n+4} ||x||``; scaled, so nothing overflows."""
    axes = list(range(x.tensor.dim())) if dims is None else dims
    wide = gamma(_count(x.tensor, dims) + 8)

    def length(tensor: Tensor) -> Tensor:
        peak = tensor.abs().max() if tensor.numel() else tensor.sum()
        scale = 2.0 ** math.frexp(float(peak))[1] if float(peak) > 0 else 1.0
        return (tensor / scale).square().sum(axes, keepdim=keep).sqrt() * scale

    result = length(x.tensor)
    # Squares of entries far below the largest underflow: at most 2^-537 of it each.
    room = 2.0**-500 * x.tensor.abs().amax() if x.tensor.numel() else 0.0
    error = length(_error(x)) * (1 + 4 * wide) + result * (2 * wide) + room
    return _finished(result, error, torch.zeros_like(result, dtype=torch.bool))


@rule("linalg_vector_norm", "norm")
def _norm(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """Euclidean norms only."""
    order = options.get("ord", operands[1] if len(operands) > 1 else 2)
    if order not in (None, 2):
        return Value(torch.full((), math.nan, dtype=torch.float64, device="cpu"))
    return _euclidean(_value(operands[0]), _dims(operands, options, 2), _keep(operands, options, 3))


@rule("_weight_norm")
def _weight_norm(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """``g v / ||v||``, the norm over all dimensions but `dim` (-1: over all)."""
    v, g = _value(operands[0]), _value(operands[1])
    dim = int(operands[2]) if len(operands) > 2 else 0
    axes = [axis for axis in range(v.tensor.dim()) if dim == -1 or axis != dim % v.tensor.dim()]
    return _mul([v, _div([g, _euclidean(v, axes, dim != -1)], {})], {})


def _product(a: Value, b: Value) -> Value:
    """``A B`` over k terms: ``|A| e_B + e_A (|B| + e_B) + gamma_{k+2} |A| |B|``."""
    inner = a.tensor.shape[-1]
    wide = gamma(inner + 2)
    result = a.tensor @ b.tensor
    size = b.tensor.abs()
    # The factor comes last: |A| gamma may underflow and then meet a large entry of B.
    error = (a.tensor.abs() @ size) * wide
    if b.error is not None:
        error = error + a.tensor.abs() @ b.error
    if a.error is not None:
        error = error + a.error @ (size if b.error is None else size + b.error)
    return Value(result, error * (1.0 + 2 * gamma(inner + 8)) + UNDERFLOW)


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner")
def _matmul(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    return _product(_value(operands[0]), _value(operands[1]))


@rule("outer", "ger")
def _outer(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    x, y = _value(operands[0]), _value(operands[1])

    def column(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[:, None]

    return _mul([Value(x.tensor[:, None], column(x.error)), y], {})


@rule("linear")
def _linear(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    x, w = _value(operands[0]), _value(operands[1])
    product = _product(x, Value(w.tensor.mT, None if w.error is None else w.error.mT))
    bias = options.get("bias", operands[2] if len(operands) > 2 else None)
    return product if bias is None else _sum([product, bias], {}, 1.0)


RULES["lipfast.matmul"] = lambda operands, options: (
    _product(_value(operands[0]), _value(operands[1]))
    if len(operands) < 3
    else _sum([_product(_value(operands[0]), _value(operands[1])), operands[2]], {}, 1.0)
)


@rule("pow")
def _pow(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """Powers 2, 1/2 and -1, -1/2."""
    exponent = operands[1]
    rules = {2: _square, 0.5: _sqrt, -1: _reciprocal, -0.5: _rsqrt}
    if not isinstance(exponent, (int, float)) or exponent not in rules:
        return Value(torch.full((), math.nan, dtype=torch.float64, device="cpu"))
    return rules[exponent](operands[:1], {})


def _composed(outer: Tensor, inner: Tensor, near: Sequence[int], far: Sequence[int]) -> Tensor:
    """``sum W_2[t_2] W_1[t_1]``, placed at ``near t_1 + far t_2``."""
    axes = range(len(near))
    sizes = [
        (inner.shape[2 + a] - 1) * near[a] + (outer.shape[2 + a] - 1) * far[a] + 1 for a in axes
    ]
    result = torch.zeros(outer.shape[0], inner.shape[1], *sizes, dtype=torch.float64, device="cpu")
    for second in itertools.product(*(range(count) for count in outer.shape[2:])):
        for first in itertools.product(*(range(count) for count in inner.shape[2:])):
            at = tuple(first[a] * near[a] + second[a] * far[a] for a in axes)
            far_taps: tuple[Any, ...] = (..., *second)
            near_taps: tuple[Any, ...] = (..., *first)
            place: tuple[Any, ...] = (..., *at)
            result[place] += outer[far_taps] @ inner[near_taps]
    return result


@rule("composed_kernels")
def composed_kernels(operands: Sequence[Any], options: Mapping[str, Any]) -> Value:
    """The kernel of two convolutions: n terms and their sums, ``gamma_{n+2} |W_2| * |W_1|``."""
    outer, inner = _value(operands[0]), _value(operands[1])
    near, far = operands[2], operands[3]
    terms = outer.tensor[0].numel() + inner.tensor[0, 0].numel() + 2

    def composed(first: Tensor, second: Tensor) -> Tensor:
        return _composed(first, second, near, far)

    size, other = outer.tensor.abs(), inner.tensor.abs()
    error = composed(size, other) * gamma(terms)
    if inner.error is not None:
        error = error + composed(size, inner.error)
    if outer.error is not None:
        error = error + composed(outer.error, other + _error(inner))
    result = composed(outer.tensor, inner.tensor)
    return Value(result, error * (1.0 + 2 * gamma(terms + 8)) + UNDERFLOW)


RULES["lipfast.composed_kernels"] = RULES.pop("aten.composed_kernels")
