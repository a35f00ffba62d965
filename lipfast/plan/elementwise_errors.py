"""Elementwise ops on parameters, with bounds of their errors; u is the unit roundoff."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lipfast.plan.parameter_rules import ROOM, Enclosure, enclosed, parameter_rule, with_error
from lipfast.rounding import SMALLEST, u, widened
from lipfast.rules.running_errors import (
    EVALUATION_ROUNDOFFS,
    error_of_extremum,
    error_of_function,
)

_EVALUATION = EVALUATION_ROUNDOFFS * u


def _power_of_two(tensor: Tensor) -> Tensor:
    return tensor.frexp().mantissa.abs() == 0.5


@parameter_rule("add")
def plus(x: object, y: object, alpha: float = 1.0) -> Enclosure:
    """``x + alpha y``: ``e_x + e_p + u |z|``, p the product; exact where torch's sum is."""
    first, second, alpha = enclosed(x), enclosed(y), float(alpha)
    scaled = second if alpha == 1.0 else times(second, alpha)
    result = first.tensor + scaled.tensor
    # The rounding of the sum itself is known exactly (Knuth); of infinite operands there is none.
    part = result - first.tensor
    lost = (first.tensor - (result - part)) + (scaled.tensor - part)
    infinite = torch.isinf(first.tensor) | torch.isinf(scaled.tensor)
    certain = first.exact & scaled.exact
    error = first.radius + scaled.radius + 2 * u * result.abs()
    return with_error(result, error).unless(certain & ((lost == 0) | infinite))


@parameter_rule("sub")
def _sub(x: object, y: object, alpha: float = 1.0) -> Enclosure:
    """``x - alpha y``, as for a sum."""
    return plus(x, y, -float(alpha))


@parameter_rule("rsub")
def _rsub(x: object, y: object, alpha: float = 1.0) -> Enclosure:
    """``y - alpha x``: the operands change places."""
    return _sub(y, x, alpha)


@parameter_rule("mul")
def times(x: object, y: object) -> Enclosure:
    """``x y``: ``|x| e_y + |y| e_x + e_x e_y + u |z|``."""
    first, second = enclosed(x), enclosed(y)
    result = first.tensor * second.tensor
    error = first.tensor.abs() * second.radius
    error = error + (second.tensor.abs() + second.radius) * first.radius
    certain = first.exact & second.exact
    small = first.whole & second.whole & (result.abs() < 2.0**53)
    zero = (first.tensor == 0) | (second.tensor == 0)
    normal = (result.abs() > 2.0**-900) & torch.isfinite(result)
    scaled = (_power_of_two(first.tensor) | _power_of_two(second.tensor)) & normal
    infinite = torch.isinf(first.tensor) | torch.isinf(second.tensor)
    exact = certain & (small | zero | scaled | infinite)
    return with_error(result, error + 2 * u * result.abs()).unless(exact)


@parameter_rule("div")
def quotient(x: object, y: object) -> Enclosure:
    """``x / y``: ``(e_x + |z| e_y) / (|y| - e_y) + 2 u |z|``; inf where y may be 0.

    Two roundings, and 2^-1074 |x|: on CUDA a number's reciprocal is multiplied with, which may be
    denormal.
    """
    first, second = enclosed(x), enclosed(y)
    result = first.tensor / second.tensor
    least = (second.tensor.abs() - second.radius) * (1.0 - 4 * u)
    moved = first.radius + widened(result.abs(), 2) * second.radius
    # The product may underflow, and then be divided by a small number.
    error = torch.where(second.radius > 0, moved + SMALLEST, moved) / least
    error = error + 2 * u * result.abs() + first.tensor.abs() * SMALLEST
    error = torch.where(least > 0, error, math.inf)
    certain = first.exact & second.exact
    # A whole quotient below 2^53 of whole numbers, if it multiplies back to them.
    wholes = first.whole & second.whole & (first.tensor.abs() < 2.0**53)
    back = (result == result.round()) & (result * second.tensor == first.tensor)
    normal = (result.abs() > 2.0**-900) & torch.isfinite(result)
    scaled = _power_of_two(second.tensor) & normal
    exact = certain & ((wholes & back) | scaled) & (second.tensor != 0)
    return with_error(result, error).unless(exact)


@parameter_rule("remainder")
def _remainder(x: object, y: object) -> Enclosure:
    """``x - y floor(x / y)`` of exact operands: `fmod` is exact, the shift by y is rounded.

    inf for operands with errors: there it jumps.
    """
    first, second = enclosed(x), enclosed(y)
    result = torch.remainder(first.tensor, second.tensor)
    certain = first.exact & second.exact
    error = torch.where(certain, 2 * u * result.abs(), math.inf)
    unmoved = (result == torch.fmod(first.tensor, second.tensor)) | (first.whole & second.whole)
    return with_error(result, error).unless(certain & unmoved)


@parameter_rule("reciprocal")
def _reciprocal(x: object) -> Enclosure:
    """``1 / x``."""
    return quotient(1.0, x)


def _moved(function: Callable[[Tensor], Tensor]) -> Callable[..., Enclosure]:
    """Nothing is rounded, and the result moves by no more than the operand."""

    def evaluate(x: object) -> Enclosure:
        value = enclosed(x)
        return replace(value, tensor=function(value.tensor))

    return evaluate


def _extremum(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Enclosure]:
    """Nothing is rounded, and the result moves by no more than either operand."""

    def evaluate(x: object, other: object) -> Enclosure:
        first, second = enclosed(x), enclosed(other)
        result = function(first.tensor, second.tensor)
        return Enclosure(result, error_of_extremum((first.error, second.error), result))

    return evaluate


negative = parameter_rule("neg")(_moved(torch.neg))
absolute = parameter_rule("abs")(_moved(torch.abs))
parameter_rule("relu")(_moved(torch.relu))
largest_of_two = parameter_rule("maximum", "clamp_min")(_extremum(torch.maximum))
_smaller = parameter_rule("minimum", "clamp_max")(_extremum(torch.minimum))


@parameter_rule("clamp")
def _clamp(x: object, min: object = None, max: object = None) -> Enclosure:  # noqa: A002
    """``min(max(x, least), most)``, in this order."""
    found = enclosed(x)
    found = found if min is None else largest_of_two(found, min)
    return found if max is None else _smaller(found, max)


@parameter_rule("square")
def _square(x: object) -> Enclosure:
    """``x^2`` as a product."""
    return times(x, x)


@parameter_rule("sqrt")
def square_root(x: object) -> Enclosure:
    """``|sqrt x - sqrt x'| <= e / sqrt x`` and at most sqrt(e); inf where x - e is negative."""
    value = enclosed(x)
    result, e = value.tensor.sqrt(), value.radius
    moved = torch.where(result > 0, torch.minimum(e / (result * (1 - 4 * u)), e.sqrt()), e.sqrt())
    error = widened(moved, 4) + 2 * u * result
    return with_error(result, torch.where(value.tensor >= e, error, math.inf))


@parameter_rule("rsqrt")
def _rsqrt(x: object) -> Enclosure:
    """``1 / sqrt(x)``."""
    return _reciprocal(square_root(x))


@parameter_rule("exp")
def _exp(x: object) -> Enclosure:
    """``(exp(e) - 1) exp(x)``, and the evaluation's own rounding."""
    value = enclosed(x)
    result = value.tensor.exp()
    error = widened(torch.expm1(value.radius) * result, 32)
    return with_error(result, error + result * _EVALUATION * (value.tensor.abs() + 2))


@parameter_rule("expm1")
def _expm1(x: object) -> Enclosure:
    """``exp(x) - 1``: the exponential moves as much; the evaluation's own rounding."""
    value = enclosed(x)
    result = value.tensor.expm1()
    error = widened(torch.expm1(value.radius) * value.tensor.exp(), 32)
    return with_error(result, error + _EVALUATION * (result.abs() + value.tensor.abs()))


@parameter_rule("log1p")
def _log1p(x: object) -> Enclosure:
    """``e / (1 + x - e)`` and the evaluation's own rounding; inf where 1 + x may be 0."""
    value = enclosed(x)
    result = value.tensor.log1p()
    least = (1.0 + value.tensor) * (1 - 4 * u) - widened(value.radius, 4)
    error = widened(value.radius / least, 4) + (result.abs() + value.tensor.abs()) * _EVALUATION
    return with_error(result, torch.where(least > 0, error, math.inf))


@parameter_rule("log")
def _log(x: object) -> Enclosure:
    """``e / (x - e)`` and the evaluation's own rounding; inf where x may be 0."""
    value = enclosed(x)
    result = value.tensor.log()
    least = (value.tensor - value.radius) * (1 - 4 * u)
    error = widened(value.radius / least, 4) + (result.abs() + 1.0) * _EVALUATION
    return with_error(result, torch.where(least > 0, error, math.inf))


def _smooth(
    function: Callable[[Tensor], Tensor], slope: float = 1.0, offset: float = 0.0
) -> Callable[..., Enclosure]:
    """``sup |f'| e`` and the evaluation's own rounding."""

    def evaluate(x: object) -> Enclosure:
        value = enclosed(x)
        z, e = function(value.tensor), value.error
        error = error_of_function(value.tensor, e, z, slope=slope, offset=offset, room=ROOM)
        return Enclosure(z, error)

    return evaluate


parameter_rule("tanh")(_smooth(torch.tanh))
parameter_rule("erf")(_smooth(torch.erf, 1.1283791670955128))  # 2 / sqrt(pi)
parameter_rule("atan")(_smooth(torch.atan))
parameter_rule("sigmoid")(_smooth(torch.sigmoid, 0.25, offset=1.0))
parameter_rule("sin")(_smooth(torch.sin))
parameter_rule("cos")(_smooth(torch.cos, offset=1.0))
_soft = _smooth(lambda y: torch.logaddexp(y, torch.zeros_like(y)), offset=1.0)


@parameter_rule("softplus")
def _soft_plus(x: object, beta: float = 1.0, threshold: float = 20.0) -> Enclosure:
    """``x`` where ``beta x > threshold``, else ``log(1 + exp(beta x)) / beta``, as torch has it.

    inf where ``beta x`` is so near to the threshold that rounding may choose the other branch.
    """
    value, beta = enclosed(x), float(beta)
    scaled = value if beta == 1.0 else times(value, beta)
    smooth = quotient(_soft(scaled), beta)
    linear = scaled.tensor > threshold
    error = torch.where(linear, value.radius, smooth.radius)
    # The difference of neighbours is exact, others are far from 0; the factor is to spare.
    near = (scaled.tensor - threshold).abs() <= widened(scaled.radius, 2)
    unsure = near & (scaled.radius > 0)
    return Enclosure(
        torch.where(linear, value.tensor, smooth.tensor), torch.where(unsure, math.inf, error)
    )


_POWERS = {2: _square, 0.5: square_root, -1: _reciprocal, -0.5: _rsqrt}


def _exponent_supported(x: object, exponent: object) -> str | None:
    if isinstance(exponent, (int, float)):
        small = float(exponent).is_integer() and 1 <= exponent <= 8
        return None if exponent in _POWERS or small else f"with the exponent {exponent}"
    positive = isinstance(x, (int, float)) and 0.0 < x < math.inf
    return None if positive else "with a tensor of exponents"


@parameter_rule("pow", supports=_exponent_supported)
def _pow(x: object, exponent: object) -> Enclosure:
    """Powers 1/2, -1, -1/2 and 1 to 8; of a positive number b also ``b^y``.

    ``|b^y - b^y'| <= b^y (exp(|log b| e) - 1)``, and the evaluation's own rounding.
    """
    if isinstance(exponent, (int, float)):
        if exponent in _POWERS:
            return _POWERS[exponent](x)
        found = enclosed(x)
        for _ in range(int(exponent) - 1):
            found = times(found, x)
        return found
    assert isinstance(x, (int, float))
    power = enclosed(exponent)
    result = float(x) ** power.tensor
    size = widened(abs(math.log(x)), 2)
    error = widened(torch.expm1(size * power.radius) * result, 32)
    rounding = _EVALUATION * (power.tensor.abs() * size + 2)
    return with_error(result, error + result * rounding)


def _counted(count: int) -> Enclosure:
    return Enclosure(torch.arange(count, dtype=torch.float64, device="cpu"))


@parameter_rule("arange")
def _arange(start: float, end: float | None = None, step: float = 1) -> Enclosure:
    """``start + i step``, one product and one sum."""
    if end is None:
        start, end = 0, start
    count = torch.arange(start, end, step, dtype=torch.float64, device="cpu").numel()
    return plus(start, times(_counted(count), step))


@parameter_rule("linspace")
def _linspace(start: float, end: float, steps: int) -> Enclosure:
    """``start + i (end - start) / (n - 1)``."""
    places = quotient(_counted(steps), float(max(1, steps - 1)))
    return plus(start, times(places, _sub(end, start)))
