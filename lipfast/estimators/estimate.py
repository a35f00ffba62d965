"""Estimates: numbers that say which side they bound, how they were got, and if that is proved."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lipfast.errors import LipfastError
from lipfast.rules.registry import Norm

Side = Literal["lower", "upper"]


class BoundOrderError(LipfastError, AssertionError):
    """A certified lower bound exceeds a certified upper bound: a defect of lipfast."""


@dataclass(frozen=True)
class Estimate:
    """A number that bounds a Lipschitz constant or a norm from one side.

    Attributes:
        value: the bound; inf if it is unbounded or too large for float64 (see `reason`).
        log_value: natural logarithm, finite where a product of many layers overflows `value`.
        side: ``lower`` or ``upper``.
        norm: 1, 2 or inf.
        method: how it was got.
        certified: true in real arithmetic, with every rounding accounted for.
        reason: why it is inf, or not certified.

    Examples:
        >>> estimate = Estimate(2.5, 0.9163, "upper", 2, "spectral product", True)
        >>> float(estimate)
        2.5
        >>> estimate
        Estimate(upper 2.5, l2, certified, spectral product)
    """

    value: float
    log_value: float
    side: Side
    norm: Norm
    method: str
    certified: bool
    reason: str | None = None

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._summary()})"

    def _summary(self) -> str:
        value = format_value(self.value, self.log_value)
        trust = "certified" if self.certified else "not certified"
        parts = [f"{self.side} {value}", norm_name(self.norm), trust, self.method]
        return ", ".join(parts) + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class LayerBracket:
    """Lower and upper estimate of the operator norm of one layer.

    Attributes:
        index: position among the layers of the plan.
        name: module path.
        kind: for instance ``linear``.
        shape: of the weight.
        lower: certified lower end.
        upper: upper end.
        certified: whether `upper` is proved.
        method: how the bracket was got.
        passes: passes over the weight that it took.
    """

    index: int
    name: str
    kind: str
    shape: tuple[int, ...]
    lower: float
    upper: float
    certified: bool
    method: str
    passes: int

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.shape)
        trust = "certified" if self.certified else "not certified"
        return (
            f"LayerBracket({self.index} {self.name}: {self.kind} {shape}, "
            f"[{self.lower:.9g}, {self.upper:.9g}], {trust})"
        )


@dataclass(frozen=True, repr=False)
class UpperBound(Estimate):
    """An upper bound with the brackets of the layers that it was made of."""

    layers: tuple[LayerBracket, ...] = ()


@dataclass(frozen=True)
class Search:
    """What a search beyond the data found.

    Attributes:
        estimate: the largest value, labelled with how it was found; not certified.
        points: where, best first: (n, D...), or (n, 2, D...) for difference quotients. Several
            inputs are flattened and joined.
        values: (n,): the Jacobian norm at each point, or the pair's difference quotient.
    """

    estimate: Estimate
    points: Tensor = field(compare=False)
    values: Tensor = field(compare=False)


@dataclass(frozen=True, repr=False)
class LowerBound(Estimate):
    """A lower bound from samples.

    With smooth activations `value` may exceed `jacobian`: a longer step can be steeper than the
    derivative at the sample.

    Attributes:
        jacobian: maximum over the samples of the Jacobian's norm; not certified (rounding, and
            at a kink autograd's value is not a derivative).
        sample: index of that sample.
        points: the two stored points (2, D...) in float64 whose difference quotient is `value`.
        mean: mean of the Jacobian norms over the samples.
        rms: root of their mean square.
        samples: how many there were.
        per_sample: the norms themselves (samples,), if asked for.
        search: what a search beyond the data found, if one was asked for.
    """

    jacobian: Estimate = field(kw_only=True)
    sample: int = field(kw_only=True)
    points: Tensor = field(kw_only=True, compare=False)
    mean: float = field(kw_only=True)
    rms: float = field(kw_only=True)
    samples: int = field(kw_only=True)
    per_sample: Tensor | None = field(default=None, kw_only=True, compare=False)
    search: Search | None = field(default=None, kw_only=True)

    def _summary(self) -> str:
        jacobian = format_value(self.jacobian.value, self.jacobian.log_value)
        text = f"{super()._summary()}; Jacobian {jacobian} at sample {self.sample}/{self.samples}"
        if self.search is None:
            return text
        found = self.search.estimate
        return f"{text}; {found.method} {format_value(found.value, found.log_value)}"


@dataclass(frozen=True)
class Bounds:
    """Lower and upper bound on the Lipschitz constant of one network.

    ``str()`` is a table of the layers followed by the bounds.
    """

    lower: LowerBound
    upper: UpperBound

    @property
    def mean(self) -> float:
        """Mean Jacobian norm over the samples."""
        return self.lower.mean

    @property
    def rms(self) -> float:
        """Root mean square of the Jacobian norms over the samples."""
        return self.lower.rms

    @property
    def layers(self) -> tuple[LayerBracket, ...]:
        """Brackets of the layers' operator norms."""
        return self.upper.layers

    @property
    def ratio(self) -> float:
        """``upper / lower``; inf if the lower bound is 0 or the quotient overflows."""
        if self.lower.value == 0.0 or self.upper.log_value == math.inf:
            return math.inf
        exponent = self.upper.log_value - self.lower.log_value
        return math.exp(exponent) if exponent < 709 else math.inf

    def __repr__(self) -> str:
        return f"Bounds({self.lower._summary()} | {self.upper._summary()})"

    def __str__(self) -> str:
        lines = layer_table(self.layers)
        width = max(len(line) for line in lines)
        lines.append("-" * width)
        lines += [_bound_line("upper", self.upper), _bound_line("lower", self.lower)]
        jacobian = self.lower.jacobian
        lines.append(
            f"{'jacobian':<9}{format_value(jacobian.value, jacobian.log_value):<14}"
            f"maximum over {self.lower.samples} samples, at sample {self.lower.sample}"
        )
        lines.append(f"{'mean':<9}{_number(self.mean):<14}of the Jacobian norms over the samples")
        lines.append(f"{'rms':<9}{_number(self.rms):<14}of the Jacobian norms over the samples")
        lines.append(f"{'ratio':<9}{_number(self.ratio):<14}upper / lower")
        return "\n".join(lines)


def _bound_line(label: str, estimate: Estimate) -> str:
    trust = "certified" if estimate.certified else "not certified"
    line = (
        f"{label:<9}{format_value(estimate.value, estimate.log_value):<14}"
        f"{norm_name(estimate.norm)}, {trust}, {estimate.method}"
    )
    return f"{line}\n{'':<9}{estimate.reason}" if estimate.reason else line


def layer_table(layers: tuple[LayerBracket, ...]) -> list[str]:
    """Lines of a table: index, name, kind, shape, bracket, certified, share of log L."""
    header = ("#", "layer", "kind", "shape", "lower", "upper", "certified", "log share")
    shares = _log_shares(layers)
    rows = [
        (
            str(layer.index),
            layer.name if len(layer.name) <= 28 else "..." + layer.name[-25:],
            layer.kind,
            "x".join(str(size) for size in layer.shape),
            f"{layer.lower:.8g}",
            f"{layer.upper:.8g}",
            "yes" if layer.certified else "no",
            share,
        )
        for layer, share in zip(layers, shares, strict=True)
    ]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    left = {1, 2}
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]


def _log_shares(layers: tuple[LayerBracket, ...]) -> list[str]:
    """Share of each layer in the logarithm of the product; negative for a layer that contracts.

    Where layers that expand and layers that contract nearly cancel, shares say nothing: "-".
    """
    logs = [math.log(layer.upper) if layer.upper > 0 else -math.inf for layer in layers]
    total, size = math.fsum(logs), math.fsum(abs(value) for value in logs)
    if not math.isfinite(total) or abs(total) <= 0.5 * size:
        return ["-"] * len(layers)
    return [f"{100 * value / total:.1f}%" for value in logs]


def norm_name(norm: Norm) -> str:
    """``l1``, ``l2`` or ``linf``."""
    return "linf" if math.isinf(norm) else f"l{int(norm)}"


def _number(value: float) -> str:
    return f"{value:.8g}"


def format_value(value: float, log_value: float) -> str:
    """Eight digits; for a finite number beyond float64, its power of ten."""
    if math.isinf(value) and math.isfinite(log_value):
        decimal = log_value / math.log(10)
        return f"{10 ** (decimal % 1):.6f}e{math.floor(decimal):+d}"
    return _number(value)


def check_order(lower: Estimate, upper: Estimate) -> None:
    """Assert lower <= upper for two certified bounds of the same constant.

    Raises:
        BoundOrderError: it does not hold.
    """
    if not (lower.certified and upper.certified):
        return
    # Where values are finite they are compared as they are; logarithms carry roundings.
    if lower.value > upper.value:
        raise BoundOrderError(
            f"certified lower bound {lower.value!r} exceeds certified upper bound {upper.value!r} "
            f"({norm_name(lower.norm)}): a defect of lipfast, please report it with the model"
        )


def joined(lower: LowerBound, upper: UpperBound) -> Bounds:
    """Both bounds of one network, their order asserted.

    Raises:
        BoundOrderError: a certified lower bound exceeds a certified upper bound.
    """
    check_order(lower, upper)
    return Bounds(lower, upper)


def log_down(value: float) -> float:
    """Natural logarithm, rounded down; -inf for 0."""
    if value <= 0.0:
        return -math.inf
    log = math.log(value)
    return math.nextafter(log - abs(log) * 2.0**-51, -math.inf) if math.isfinite(log) else log
