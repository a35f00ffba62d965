"""Brackets of layers: a lower and an upper estimate of an operator norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lipfast.plan.layers import Layer


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


@dataclass(frozen=True, eq=False)
class LayerBrackets:
    """Brackets of all layers of some networks of one architecture: arrays (networks, layers).

    Attributes:
        layers: of the architecture.
        lower: float64.
        upper: float64.
        certified: truth values.
        passes: integers.
        methods: how each bracket was got.
    """

    layers: Sequence[Layer]
    lower: npt.NDArray[np.float64]
    upper: npt.NDArray[np.float64]
    certified: npt.NDArray[np.bool_]
    passes: npt.NDArray[np.int64]
    methods: npt.NDArray[Any]

    @classmethod
    def of_all(cls, layers: Sequence[Layer], *columns: Any) -> LayerBrackets:
        """Arrays of networks times layers: `lower` to `methods` in this order."""
        return cls(layers, *(column.reshape(-1, len(layers)) for column in columns))

    @classmethod
    def empty(cls, layers: Sequence[Layer], networks: int) -> LayerBrackets:
        """Room for all of them."""
        shape = (networks, len(layers))
        lower, upper = np.zeros((2, *shape))
        certified, passes = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
        return cls(layers, lower, upper, certified, passes, np.empty(shape, dtype=object))

    def of(self, network: int) -> tuple[LayerBracket, ...]:
        """Those of one network."""
        fields = (self.lower, self.upper, self.certified, self.methods, self.passes)
        columns = zip(*(field[network].tolist() for field in fields), strict=True)
        return tuple(
            LayerBracket(layer.index, layer.name, layer.kind, layer.shape, *values)
            for layer, values in zip(self.layers, columns, strict=True)
        )

    def put(self, found: LayerBrackets) -> None:
        """Take those of some layers."""
        columns = [layer.index for layer in found.layers]
        for name in ("lower", "upper", "certified", "passes", "methods"):
            getattr(self, name)[:, columns] = getattr(found, name)

    def widen(self, position: int, errors: Sequence[float]) -> None:
        """Brackets of what is within an error of the truth, in the norm, become those of the truth.

        Args:
            position: of the layer here.
            errors: for each network.
        """
        room = np.array(errors)
        lower, upper = self.lower[:, position], self.upper[:, position]
        # One step outwards: a sum has one rounding.
        lower = np.where(room > 0, np.maximum(0.0, np.nextafter(lower - room, 0.0)), lower)
        upper = np.where(room > 0, np.nextafter(upper + room, np.inf), upper)
        self.lower[:, position], self.upper[:, position] = lower, upper
