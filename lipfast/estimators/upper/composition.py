"""How an upper bound was composed: the constants of all nodes, and their shares of log L."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lipfast.ops.modes import plain_arithmetic
from lipfast.rules.upward import Upward


@dataclass(frozen=True)
class Operation:
    """One node without its constant: the same for all state dicts.

    Attributes:
        name: of the node.
        op: ATen operator, or ``input``.
        module: path of the module that it came from.
        operands: the nodes that it reads, each once.
        layer: index of the layer whose norm is in it.
        given: whether its rule is a user's.
    """

    name: str
    op: str
    module: str
    operands: tuple[str, ...]
    layer: int | None = None
    given: bool = False


@dataclass(frozen=True, kw_only=True)
class Part(Operation):
    """One node of the graph, with its constant.

    `op` is ``outputs`` for several outputs taken together, and `operands` are those that depend on
    the input.

    Attributes:
        contributions: for several operands, the node's constant if only that one varied.
        value: Lipschitz constant with respect to the model's inputs.
    """

    contributions: tuple[Upward, ...]
    value: Upward

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """The derivative of log L(node) by the logarithm of each contribution; they add up to 1."""
        if not self.contributions:
            return (1.0,) * len(self.operands)
        logs = [part.log for part in self.contributions]
        largest = max(logs)
        if not math.isfinite(largest):  # unbounded: by whom
            count = logs.count(largest)
            return tuple(1.0 / count if log == largest else 0.0 for log in logs)
        powers = [[math.exp(p * (log - largest)) for log in logs] for p in (1, 2)]
        sums = [math.log(math.fsum(terms)) / p for p, terms in zip((1, 2), powers, strict=True)]
        # A sum, the root of a sum of squares, or a maximum.
        distances = [abs(largest + value - self.value.log) for value in (*sums, 0.0)]
        kind = distances.index(min(distances))
        if kind == 2:
            return tuple(float(i == logs.index(largest)) for i in range(len(logs)))
        return tuple(term / math.fsum(powers[kind]) for term in powers[kind])


@dataclass(frozen=True)
class Sources:
    """Where log L comes from: ``log L = sum(layers) + other + branches`` but for rounding.

    Where branches meet, ``log(a + b) = s log a + (1 - s) log b + H(s)`` with s = a / (a + b) and
    the entropy H: a layer counts with the share of the paths that it is on, and H is what having
    several branches adds.

    Attributes:
        layers: one number per layer, in their order.
        other: activations, pools, normalisations and other ops without a layer.
        branches: sums and concatenations.
    """

    layers: tuple[float, ...]
    other: float
    branches: float


class Contributions(Mapping[str, Mapping[str, Upward]]):
    """For nodes with several operands, the node's constant if only one of them varied.

    Found when somebody asks; most never do. Copied and pickled as the plain dictionary.
    """

    def __init__(
        self, entries: dict[str, Mapping[str, Upward] | Callable[[], Mapping[str, Upward]]]
    ) -> None:
        self._entries = entries

    def __getitem__(self, node: str) -> Mapping[str, Upward]:
        entry = self._entries[node]
        if not isinstance(entry, Mapping):
            with plain_arithmetic():
                entry = self._entries[node] = entry()
        return entry

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)


@dataclass(frozen=True, eq=False, repr=False)
class Composition:
    """The constants of all nodes of one network; holds no weights.

    Attributes:
        operations: in topological order, inputs first.
        constants: by name.
        contributions: of nodes with several operands that depend on the input: operand -> the
            node's constant if only that one varied.
        outputs: names.
        total: their constant, taken together.
    """

    operations: Sequence[Operation]
    constants: Mapping[str, Upward]
    contributions: Mapping[str, Mapping[str, Upward]]
    outputs: Sequence[str]
    total: Upward

    @cached_property
    def result(self) -> str:
        """Name of the last part: the output, or a part that joins several."""
        if len(self.outputs) == 1:
            return self.outputs[0]
        name = "outputs"
        while name in self.constants:
            name += "_"
        return name

    @cached_property
    def parts(self) -> Mapping[str, Part]:
        """What the outputs depend on, by name, in topological order."""
        known = {}
        for node in self.operations:
            live = tuple(name for name in node.operands if self.constants[name].mantissa)
            known_here = len(live) > 1 and node.name in self.contributions
            # Not `get`, which would take a KeyError inside of a rule for a missing entry.
            several = self.contributions[node.name] if known_here else {}
            known[node.name] = Part(
                node.name,
                node.op,
                node.module,
                live,
                node.layer,
                node.given,
                contributions=tuple(several[name] for name in live if several),
                value=self.constants[node.name],
            )
        if self.result not in known:
            live = tuple(dict.fromkeys(name for name in self.outputs if known[name].value.mantissa))
            values = tuple(known[name].value for name in live if len(live) > 1)
            known[self.result] = Part(
                self.result, "outputs", "", live, contributions=values, value=self.total
            )
        needed = {self.result}
        for part in reversed(list(known.values())):
            if part.name in needed:
                needed.update(part.operands)
        return {name: part for name, part in known.items() if name in needed}

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """The derivative of log L by the logarithm of each node's constant."""
        weights = dict.fromkeys(self.parts, 0.0)
        weights[self.result] = 1.0
        for part in reversed(list(self.parts.values())):
            for operand, share in zip(part.operands, part.shares, strict=True):
                weights[operand] += weights[part.name] * share
        return weights

    def sources(self, count: int) -> Sources:
        """Where log L comes from, `count` layers among it; NaN where it is infinite."""
        if not math.isfinite(self.parts[self.result].value.log):
            return Sources((math.nan,) * count, math.nan, math.nan)
        layers, other, branches = [0.0] * count, [0.0], [0.0]
        for part in self.parts.values():
            weight, value = self.weights[part.name], part.value.log
            if weight == 0.0 or not part.operands:
                continue
            operands = [self.parts[name].value.log for name in part.operands]
            parts = [part.log for part in part.contributions] or [value]
            live = [(s, c, x) for s, c, x in zip(part.shares, parts, operands, strict=True) if s]
            mixed = math.fsum(share * log for share, log, _ in live)
            gain = weight * math.fsum(share * (log - before) for share, log, before in live)
            branches.append(weight * (value - mixed))
            if part.layer is None:
                other.append(gain)
            else:
                layers[part.layer] += gain
        return Sources(tuple(layers), math.fsum(other), math.fsum(branches))
