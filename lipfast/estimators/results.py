"""Results: an upper bound with its layers, a lower bound with its points, and both together."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lipfast.errors import ArgumentError, LipfastError
from lipfast.estimators.estimate import Estimate, eight_digits, format_value, norm_name
from lipfast.estimators.floor.result import Floor
from lipfast.estimators.upper.composition import Composition, Sources
from lipfast.estimators.upper.explanation import Explanation, explanation
from lipfast.estimators.upper.layer_bracket import LayerBracket
from lipfast.estimators.upper.quadratic.certificate import QuadraticCertificate
from lipfast.estimators.upper.table import WIDTH, layer_frame, layer_html, layer_table, shares_of
from lipfast.text import given_rules


class BoundOrderError(LipfastError, AssertionError):
    """A certified lower bound exceeds a certified upper bound: a wrong rule, or a defect."""


@dataclass(frozen=True, repr=False)
class UpperBound(Estimate):
    """An upper bound with the brackets of the layers that it was made of.

    ``str()`` is a table of the layers followed by the bound; a notebook shows it as HTML.

    Attributes:
        layers: their brackets.
        composition: the constants of all nodes of the graph, which `explain` lays out: of the
            product of norms, also where another method proves less.
        certificate: of quadratic constraints of a chain, what proves the bound; None on a domain.
        floor: what no bound that ignores reachability can be below, if it was asked for: it says
            how far such bounds could come down, and is no bound of the Lipschitz constant.

    Examples:
        >>> import torch, lipfast
        >>> first, second = (torch.nn.Linear(2, 2, bias=False) for _ in range(2))
        >>> for layer, scale in ((first, 2.0), (second, 8.0)):
        ...     _ = layer.weight.data.copy_(scale * torch.eye(2))
        >>> model = torch.nn.Sequential(first, torch.nn.ReLU(), second)
        >>> upper = lipfast.upper_bound(model, torch.zeros(1, 2))
        >>> [round(share, 4) for share in upper.log_shares]
        [0.25, 0.75]
    """

    layers: tuple[LayerBracket, ...] = ()
    composition: Composition | None = field(default=None, compare=False, kw_only=True)
    certificate: QuadraticCertificate | None = field(default=None, compare=False, kw_only=True)
    floor: Floor | None = field(default=None, compare=False, kw_only=True)

    @property
    def sources(self) -> Sources | None:
        """Where the product's log L comes from; None for a bound that lipfast did not compose."""
        return None if self.composition is None else self.composition.sources(len(self.layers))

    @property
    def log_shares(self) -> tuple[float | None, ...]:
        """Share of each layer in log L, as in the table; None where shares say nothing."""
        return tuple(shares_of(self.layers, self.sources)[0])

    def explain(self) -> Explanation:
        """The bound as an expression: a product of factors, and sums where branches meet.

        ``print`` shows a tree that says which branch dominates; `Explanation.steps` and
        `Explanation.walk` go through it.

        Raises:
            ArgumentError: the bound was not composed by lipfast.
        """
        if self.composition is None:
            raise ArgumentError("this bound has no composition: it was not made by upper_bound")
        title = "\n".join([repr(self), *self._product_line()])
        return explanation(self.composition, self.layers, title)

    def to_pandas(self) -> Any:
        """The layers as a `pandas.DataFrame`: the fields of `LayerBracket` and `log_share`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return layer_frame(self.layers, self.sources)

    def __str__(self) -> str:
        return self._with_table(self._lines())

    def _with_table(self, lines: list[str]) -> str:
        table = layer_table(self.layers, self.sources)
        return "\n".join([*table, "-" * max(len(line) for line in table), *lines])

    def _repr_html_(self) -> str:
        return layer_html(self.layers, self.sources, "\n".join(self._lines()))

    def _lines(self) -> list[str]:
        floor = [] if self.floor is None else self.floor.lines(WIDTH)
        return [_bound_line("upper", self), *self._product_line(), *floor]

    def _summary(self) -> str:
        text = super()._summary()
        return text if self.floor is None else f"{text} | {self.floor!r}"

    def _product_line(self) -> list[str]:
        """What the layers and their shares make, where another method proves less."""
        total = None if self.composition is None else self.composition.total
        if total is None or not self.log_value < total.log:
            return []
        value = format_value(total.value, total.log)
        return [f"{'product':<9}{value:<14}of norms and constants: what the shares are of"]


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
        sample_point: the sample itself; several inputs are flattened and joined.
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
    sample_point: Tensor | None = field(default=None, kw_only=True, compare=False)

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
    def floor(self) -> Floor | None:
        """What no bound that ignores reachability can be below, if it was asked for."""
        return self.upper.floor

    @property
    def mean(self) -> float:
        """Mean Jacobian norm over the samples."""
        return self.lower.mean

    @property
    def rms(self) -> float:
        """Root mean square of the Jacobian norms over the samples."""
        return self.lower.rms

    @property
    def given(self) -> tuple[str, ...]:
        """Ops whose rules a user wrote: what either bound is proved given."""
        return tuple(sorted({*self.lower.given, *self.upper.given}))

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

    def explain(self) -> Explanation:
        """The upper bound as an expression; see `UpperBound.explain`."""
        return self.upper.explain()

    def to_pandas(self) -> Any:
        """The layers as a `pandas.DataFrame`; see `UpperBound.to_pandas`."""
        return self.upper.to_pandas()

    def __str__(self) -> str:
        return self.upper._with_table(self._lines())

    def _repr_html_(self) -> str:
        return layer_html(self.layers, self.upper.sources, "\n".join(self._lines()))

    def _lines(self) -> list[str]:
        jacobian = self.lower.jacobian
        return [
            *self.upper._lines(),
            _bound_line("lower", self.lower),
            f"{'jacobian':<9}{format_value(jacobian.value, jacobian.log_value):<14}"
            f"maximum over {self.lower.samples} samples, at sample {self.lower.sample}",
            f"{'mean':<9}{eight_digits(self.mean):<14}of the Jacobian norms over the samples",
            f"{'rms':<9}{eight_digits(self.rms):<14}of the Jacobian norms over the samples",
            f"{'ratio':<9}{eight_digits(self.ratio):<14}upper / lower",
        ]


def _bound_line(label: str, estimate: Estimate) -> str:
    line = (
        f"{label:<9}{format_value(estimate.value, estimate.log_value):<14}"
        f"{norm_name(estimate.norm)}, {estimate.trust}, {estimate.method}"
    )
    if not estimate.reason:
        return line
    indent = " " * 9
    reason = textwrap.wrap(estimate.reason, WIDTH, initial_indent=indent, subsequent_indent=indent)
    return "\n".join([line, *reason])


def check_order(lower: Estimate, upper: Estimate) -> None:
    """Assert lower <= upper for two certified bounds of the same constant.

    Raises:
        BoundOrderError: it does not hold.
    """
    if not (lower.certified and upper.certified):
        return
    # Where values are finite they are compared as they are; logarithms carry roundings.
    if lower.value > upper.value:
        given = tuple(dict.fromkeys((*lower.given, *upper.given)))
        cause = "a defect of lipfast, please report it with the model"
        if given:
            cause = f"they are proved {given_rules(given)}, which cannot be right: mend it"
        raise BoundOrderError(
            f"certified lower bound {lower.value!r} exceeds certified upper bound {upper.value!r} "
            f"({norm_name(lower.norm)}): {cause}"
        )


def ordered(lower: LowerBound, upper: UpperBound, floor: Floor | None = None) -> Bounds:
    """Both bounds of one network, their order asserted, and the floor if there is one.

    Raises:
        BoundOrderError: a certified lower bound exceeds a certified upper bound.
    """
    check_order(lower, upper)
    return Bounds(lower, upper if floor is None else replace(upper, floor=floor))
