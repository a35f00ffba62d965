"""Graphs that are one map after the other, with entrywise ops between.

Part of the proof of interval Jacobians and of quadratic constraints of chains: both read a graph
as such a chain, each with conditions of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from lipfast.estimators.upper.sweep import Step, Sweep
from lipfast.plan.layers import Layer
from lipfast.rules.registry import written_here


@dataclass(frozen=True)
class MapChain:
    """Matrices on the last axis, each reading what the one before leads to.

    Attributes:
        layers: the matrices, at least one.
        between: what is before the first matrix and behind each, in order: entrywise ops that have
            slopes, and reshapes.
    """

    layers: tuple[Layer, ...]
    between: tuple[tuple[Step, ...], ...]


def map_chain(sweep: Sweep) -> MapChain | None:
    """The chain that a graph is, from its only input to its only result; None where it is none."""
    if sweep not in _MAP_CHAINS:
        _MAP_CHAINS[sweep] = _read_chain(sweep)
    return _MAP_CHAINS[sweep]


_MAP_CHAINS: WeakKeyDictionary[Sweep, MapChain | None] = WeakKeyDictionary()


def _read_chain(sweep: Sweep) -> MapChain | None:
    if len(sweep.inputs) != 1:
        return None
    layers: list[Layer] = []
    between: list[list[Step]] = [[]]
    previous = sweep.inputs[0]
    for step in sweep.steps:
        if [name for name in step.names if name is not None] != [previous]:
            return None
        previous, index = step.node.name, step.operation.layer
        if step.rule.reshapes:
            between[-1].append(step)
        elif index is not None:
            layer = sweep.layers[index]
            if layer.convolution is not None or not written_here(step.rule):
                return None
            layers.append(layer)
            between.append([])
        elif step.rule.slopes is None:
            return None
        else:
            between[-1].append(step)
    # What is a result on the way, or twice, is more than the chain's end.
    if not layers or sweep.outputs != (previous,):
        return None
    return MapChain(tuple(layers), tuple(map(tuple, between)))
