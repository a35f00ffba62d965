"""Upper bounds of many networks: arrays, and the `UpperBound` of each where somebody asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.composition import Composition
from lipfast.estimators.upper.layer_bracket import LayerBrackets
from lipfast.estimators.upper.quadratic.certificate import Multipliers, QuadraticCertificate
from lipfast.estimators.upper.starts import StartVectors
from lipfast.norms import Norm
from lipfast.ops.denormals import FLUSHED

_METHOD_OF_NORM = {
    1: "product of column-sum norms",
    2: "product of certified spectral norms",
    math.inf: "product of row-sum norms",
}


@dataclass(frozen=True, eq=False)
class Tighter:
    """Certified bounds of some networks by another method; the smaller of both is taken.

    Attributes:
        method: how they were got.
        values: inf where the method has none.
        logs: their logarithms.
        certificate: of a network, what proves its bound, if that can be checked again.
        warm_start: of a network, what to start from at similar weights.
        reasons: why the method has none, or None.
    """

    method: str
    values: Sequence[float]
    logs: Sequence[float]
    certificate: Callable[[int], QuadraticCertificate] | None = None
    warm_start: Callable[[int], Multipliers] | None = None
    reasons: Sequence[str | None] | None = None


@dataclass(frozen=True, eq=False)
class UpperBoundsOfGraph:
    """Upper bounds of networks that share a graph.

    Attributes:
        networks: which of all.
        brackets: of their layers.
        starts: what to start from at similar weights.
        composition: of a network, by its position here.
        values: the bounds.
        logs: their logarithms.
        reasons: why one is infinite, or None.
        tighter: bounds of the same networks by other methods, which are perhaps smaller; or why a
            method that was asked for has none.
    """

    networks: Sequence[int]
    brackets: LayerBrackets
    starts: Sequence[StartVectors]
    composition: Callable[[int], Composition]
    values: Sequence[float]
    logs: Sequence[float]
    reasons: Sequence[str | None]
    tighter: Sequence[Tighter | str] = ()


class UpperBounds:
    """Upper bounds of N networks of one architecture.

    Attributes:
        values: N bounds; inf where one is unbounded or beyond float64.
        logs: their natural logarithms.
        certified: whether each is proved.
        reasons: why it is inf or not certified, or None.
        starts: for each network what to start from at similar weights.
        methods: how each was got.
        norm: 1, 2 or inf.
        given: ops whose rules a user wrote.
    """

    def __init__(
        self,
        norm: Norm,
        count: int,
        parts: Sequence[UpperBoundsOfGraph],
        given: tuple[str, ...],
        flushed: bool,
    ) -> None:
        self.norm, self.given = norm, given
        self._places: list[tuple[UpperBoundsOfGraph, int]] = []
        if len(parts) == 1:
            self._places = [(parts[0], position) for position in range(count)]
        elif parts:
            places = {
                network: (part, position)
                for part in parts
                for position, network in enumerate(part.networks)
            }
            self._places = [places[network] for network in range(count)]
        self.values = [part.values[position] for part, position in self._places]
        self.logs = [part.logs[position] for part, position in self._places]
        self.reasons = [part.reasons[position] for part, position in self._places]
        self.certified = [True] * count
        self._tightened: dict[int, Tighter] = {}
        self.methods = [_METHOD_OF_NORM[norm]] * count
        for part in parts:
            for position, note in _doubtful(part.brackets).items():
                self._doubt(part.networks[position], note)
        for network, (part, position) in enumerate(self._places):
            for tighter in part.tighter:
                self._tighten(network, tighter, position)
        if flushed:
            for network in range(count):
                self._doubt(network, FLUSHED)

    def _tighten(self, network: int, tighter: Tighter | str, position: int) -> None:
        """Take the smaller bound; a proof of its own says nothing of the layers' norms."""
        why = tighter if isinstance(tighter, str) else None
        if isinstance(tighter, Tighter) and tighter.reasons is not None:
            why = tighter.reasons[position]
        if why is not None:
            before = self.reasons[network]
            self.reasons[network] = f"{before}; {why}" if before else why
            return
        if isinstance(tighter, str) or not tighter.logs[position] < self.logs[network]:
            return
        self._tightened[network] = tighter
        self.values[network], self.logs[network] = (
            tighter.values[position],
            tighter.logs[position],
        )
        self.methods[network], self.certified[network] = tighter.method, True
        self.reasons[network] = None

    def _doubt(self, network: int, note: str) -> None:
        before = self.reasons[network]
        self.reasons[network] = f"{before}; {note}" if before else note
        self.certified[network] = False

    def __len__(self) -> int:
        return len(self._places)

    @property
    def starts(self) -> Sequence[StartVectors]:
        """For each network what to start from at similar weights."""
        parts = {id(part): part for part, _ in self._places}
        if len(parts) == 1:
            return next(iter(parts.values())).starts
        return [part.starts[position] for part, position in self._places]

    def warm_start(self, network: int) -> Multipliers | None:
        """What quadratic constraints of similar weights start from."""
        part, position = self._places[network]
        for tighter in part.tighter:
            if isinstance(tighter, Tighter) and tighter.warm_start is not None:
                return tighter.warm_start(position)
        return None

    def brackets(self, network: int) -> tuple[LayerBrackets, int]:
        """The arrays that hold the brackets of a network's layers, and its row in them."""
        part, position = self._places[network]
        return part.brackets, position

    def of(self, network: int) -> UpperBound:
        """The bound of one network, with its layers and its composition."""
        part, position = self._places[network]
        return UpperBound(
            value=self.values[network],
            log_value=self.logs[network],
            side="upper",
            norm=self.norm,
            method=self.methods[network],
            certified=self.certified[network],
            reason=self.reasons[network],
            layers=part.brackets.of(position),
            composition=part.composition(position),
            given=self.given,
            certificate=self._certificate(network),
        )

    def _certificate(self, network: int) -> QuadraticCertificate | None:
        taken, position = self._tightened.get(network), self._places[network][1]
        if taken is None or taken.certificate is None:
            return None
        return taken.certificate(position)


def _doubtful(brackets: LayerBrackets) -> dict[int, str]:
    """For networks with layers that are not certified, which."""
    if bool(brackets.certified.all()):
        return {}
    found = {}
    for position, certified in enumerate(brackets.certified.tolist()):
        layers = [str(index) for index, sure in enumerate(certified) if not sure]
        if layers:
            found[position] = f"the norms of layers {', '.join(layers)} are not certified"
    return found
