"""The forward sweep of many networks at once: arrays in the place of numbers.

Part of the proof of upper bounds as `sweep` is, and no other: what comes of every network is what
its own sweep gives, bit by bit. lipfast's rules are asked once for all networks; a rule that looks
at a single number or at the weights, and a user's, is asked once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from torch import Tensor

from lipfast.errors import naming
from lipfast.estimators.upper.composition import Composition, Contributions
from lipfast.estimators.upper.sweep import ITSELF, ZERO, Step, Sweep
from lipfast.graph.nodes import Constant
from lipfast.norms import Norm
from lipfast.plan.architecture import Architecture
from lipfast.rules.registry import Call, written_here
from lipfast.rules.upward import Upward, p_norm
from lipfast.rules.upwards import Floats, Upwards

# For fewer networks arrays take longer than numbers.
FEWEST = 4


class Unread(Mapping[str, Tensor]):
    """No weights: a rule that looks for some must be asked once per network."""

    def __getitem__(self, name: str) -> NoReturn:
        raise LookupError(f"'{name}' differs between networks")

    def get(self, name: str, default: object = None) -> NoReturn:
        """Raise an error, as every other look."""
        raise LookupError(f"'{name}' differs between networks")

    def __contains__(self, name: object) -> NoReturn:
        raise LookupError(f"'{name}' may be in some networks only")

    def __iter__(self) -> NoReturn:
        raise LookupError("weights differ between networks")

    def __len__(self) -> NoReturn:
        raise LookupError("weights differ between networks")


class _Row(Mapping[str, Upward]):
    """One network's numbers out of those of all; copied and pickled as a plain dictionary."""

    def __init__(self, numbers: Mapping[str, Upward], network: int) -> None:
        self._numbers, self._network = numbers, network

    def __getitem__(self, name: str) -> Upward:
        return one_of(self._numbers[name], self._network)

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __reduce__(self) -> tuple[object, ...]:
        return dict, (dict(self),)


def one_of(number: Upward, network: int) -> Upward:
    """One network's number, perhaps the same for all."""
    return number[network] if isinstance(number, Upwards) else number


_Meeting = Mapping[str, Upward] | Callable[[], Mapping[str, Upward]]


@dataclass(frozen=True, eq=False)
class Compositions:
    """The constants of all nodes of some networks.

    Attributes:
        sweep: of the graph.
        constants: by name.
        meetings: for nodes with several operands and a network, what `Contributions` takes.
        total: of the outputs together.
        reasons: for each network why some constants are infinite.
    """

    sweep: Sweep
    constants: Mapping[str, Upward]
    meetings: Mapping[str, Callable[[int], _Meeting]]
    outputs: Sequence[str]
    total: Upwards
    reasons: Sequence[Sequence[str]]

    def of(self, network: int) -> Composition:
        """The composition of one network."""
        entries = {name: meeting(network) for name, meeting in self.meetings.items()}
        return Composition(
            self.sweep.operations,
            _Row(self.constants, network),
            Contributions(entries),
            self.outputs,
            self.total[network],
        )


def composed_together(
    plan: Architecture,
    sweep: Sweep,
    parameters: Sequence[Mapping[str, Tensor]],
    layers: Floats,
    *,
    norm: Norm,
) -> Compositions:
    """Carry ``L(node)`` of many networks through a graph that asks for no magnitudes.

    Args:
        plan: the architecture.
        sweep: one of its graphs, with `Sweep.needs_sizes` false.
        parameters: of at least two networks, with those that are new in the graph.
        layers: upper ends of the layers' norms, (networks, layers).
        norm: 1, 2 or inf.
    """
    count = len(parameters)
    constants: dict[str, Upward] = dict.fromkeys(sweep.inputs, ITSELF)
    reasons: list[list[str]] = [[] for _ in range(count)]
    meetings: dict[str, Callable[[int], _Meeting]] = {}
    for step in sweep.steps:
        name, operation = step.node.name, step.operation
        operands = [ZERO if name is None else constants[name] for name in step.names]

        def call_of(network: int, step: Step = step, operands: Sequence[Upward] = operands) -> Call:
            own = [one_of(operand, network) for operand in operands]
            row = layers[network].tolist()
            return step.call(own, row, parameters[network], plan.constants, norm)

        found, reason = _for_all(step, operands, layers, plan.constants, norm)
        calls = None
        if found is None:
            with naming(step.node.op, step.node.module):
                calls = [call_of(network) for network in range(count)]
                found = Upwards.joined([step.bound(call) for call in calls])
            told = [call.reason for call in calls]
        else:
            told = [reason] * count
        for own, text in zip(reasons, told, strict=True):
            if text is not None:
                own.append(f"{text} (module '{step.node.module}')")
        constants[name] = found
        if len(operation.operands) > 1:
            if step.asked_later:
                meetings[name] = partial(_asked_later, step, operands, layers, norm)
            else:
                calls = calls or [call_of(network) for network in range(count)]
                meetings[name] = [step.alone(call) for call in calls].__getitem__
    outputs = plan.graph.outputs
    total = Upwards.alike(p_norm([constants[name] for name in outputs], norm), count)
    return Compositions(sweep, constants, meetings, outputs, total, reasons)


def _for_all(
    step: Step,
    operands: Sequence[Upward],
    layers: Floats,
    constants: Mapping[str, Constant],
    norm: Norm,
) -> tuple[Upward | None, str | None]:
    """What the rule answers for all networks at once, and its reason; None: ask it for each."""
    if norm in step.one_by_one or not written_here(step.rule):
        return None, None
    layer = step.operation.layer
    size: Any = 0.0 if layer is None else Upwards.of(layers[:, layer])
    call = Call(step.node, norm, operands, list(step.shapes), size, Unread(), constants)
    try:
        return step.bound(call), call.reason
    except Exception:  # the rule looks at one number, or at weights; or fails, as it will for each
        step.one_by_one.add(norm)
        return None, None


def _asked_later(
    step: Step, operands: Sequence[Upward], layers: Floats, norm: Norm, network: int
) -> Callable[[], Mapping[str, Upward]]:
    """What `Contributions` asks for: no weights are kept."""

    def alone() -> Mapping[str, Upward]:
        own = [one_of(operand, network) for operand in operands]
        return step.alone(step.call(own, layers[network].tolist(), {}, {}, norm))

    return alone
