"""The bracket of one layer: a lower and an upper estimate of its operator norm."""

from __future__ import annotations

from dataclasses import dataclass


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
