"""What users write for a rule: arguments are checked; errors inside name the op and the part."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, naming
from lipfast.graph.nodes import Node
from lipfast.ops.chain_stages import Stage
from lipfast.rules.magnitude import Magnitude
from lipfast.rules.upward import Upward


class Guarded:
    """A part of a rule: errors inside that are not lipfast's own name the op and the part.

    Args:
        op: whose rule it is.
        name: of the part, such as ``evaluate``.
        part: what the user wrote; its first argument is a node, or holds one.
    """

    def __init__(self, op: str, name: str, part: Callable[..., Any]) -> None:
        self._op, self._name, self._part = op, name, part
        functools.update_wrapper(self, part)

    def __call__(self, *arguments: Any) -> Any:
        """What the part answers, checked."""
        first = arguments[0]
        node: Node = first if isinstance(first, Node) else first.node
        with naming(self._op, node.module, f"the '{self._name}' of its rule"):
            return _CHECKS[self._name](self._part(*arguments), node, arguments)


def _bound(answer: Any, node: Node, arguments: Any) -> Upward:
    return answer if isinstance(answer, Upward) else Upward.of(float(answer))


def _as_numbers(answer: Any, node: Node, arguments: Any) -> tuple[float, ...]:
    return tuple(float(number) for number in answer)


def _truth(answer: Any, node: Node, arguments: Any) -> bool:
    return bool(answer)


def _value(answer: Any, node: Node, arguments: Any) -> Tensor:
    """Values (networks, samples, *shape) of the node."""
    _require(answer, Tensor)
    given = arguments[0]
    operand = next(reference for reference in node.references() if reference.kind == "node")
    shape = (*given.value(operand).shape[:2], *node.shape)
    if answer.shape != shape:
        raise ValueError(f"it returns shape {tuple(answer.shape)}, not {tuple(shape)}")
    return answer  # type: ignore[no-any-return]


def _error(answer: Any, node: Node, arguments: Any) -> Tensor:
    _require(answer, Tensor)
    return answer.expand(arguments[2].shape)  # type: ignore[no-any-return]


def _some_stages(answer: Any, node: Node, arguments: Any) -> Sequence[Stage] | None:
    if answer is None:
        return None
    stages: tuple[Stage, ...] = tuple(answer)
    for stage in stages:
        _require(stage, *get_args(Stage))
    return stages


def _text(answer: Any, node: Node, arguments: Any) -> str | None:
    return _require(answer, str, type(None))  # type: ignore[no-any-return]


def _request(answer: Any, node: Node, arguments: Any) -> Any:
    if not hasattr(answer, "parameter"):
        raise TypeError(f"it returns {answer!r}, not a lipfast.rules.LayerRequest")
    return answer


def _size(answer: Any, node: Node, arguments: Any) -> Magnitude:
    return _require(answer, Magnitude)  # type: ignore[no-any-return]


def _range(answer: Any, node: Node, arguments: Any) -> tuple[Any, Any] | None:
    """Slopes: two finite numbers or tensors that broadcast against a sample, the least first."""
    if answer is None:
        return None
    low, high = (torch.as_tensor(end, dtype=torch.float64) for end in answer)
    if not bool((low.isfinite() & high.isfinite() & (low <= high)).all()):
        raise ValueError("slopes must be finite numbers, the least first")
    try:
        low.expand(node.shape), high.expand(node.shape)
    except RuntimeError:
        raise ValueError(f"slopes must broadcast against samples of shape {node.shape}") from None
    return (low, high) if low.dim() or high.dim() else (low.item(), high.item())


def _require(answer: Any, *kinds: type) -> Any:
    if not isinstance(answer, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"it returns a {type(answer).__name__}, not {expected}")
    return answer


_CHECKS: dict[str, Callable[[Any, Node, Any], Any]] = {
    "bound": _bound,
    "layer": _request,
    "supports": _text,
    "evaluate": _value,
    "error": _error,
    "breakpoints": _as_numbers,
    "magnitude": _size,
    "product": _truth,
    "stage": _some_stages,
    "slopes": _range,
}
PARTS = tuple(_CHECKS)
_FLAGS = ("leading", "reshapes", "moves", "integers", "maskable")


def constant_slopes(slopes: Any) -> Callable[[Any], tuple[float, float]]:
    """Two slopes that are alike for every call.

    Raises:
        ArgumentError: not two finite numbers, the least first.
    """
    try:
        low, high = (float(slope) for slope in slopes)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -math.inf < low <= high < math.inf:
        raise ArgumentError(
            f"slopes must be two finite numbers, the least first, or a function, not {slopes!r}"
        )
    return lambda _: (low, high)


def check_facts(
    ops: Sequence[object], facts: Mapping[str, Any], words: Mapping[str, Sequence[str]]
) -> None:
    """What `rule` is given.

    Args:
        ops: names.
        facts: the arguments.
        words: which words some of them may be.

    Raises:
        ArgumentError: see `rule`.
    """
    if not ops:
        raise ArgumentError("rule needs the name of an op, such as 'aten.sin'")
    for op in ops:
        if not isinstance(op, str) or op.count(".") != 1 or "" in op.split("."):
            raise ArgumentError(f"op must look like 'aten.sin' (no overload), not {op!r}")
    for name, value in facts.items():
        if name in words and value is not None and value not in words[name]:
            raise ArgumentError(f"{name} must be one of {', '.join(words[name])}, not {value!r}")
        if name in PARTS and value is not None and not callable(value):
            raise ArgumentError(f"{name} must be a function, not {value!r}")
        if name in _FLAGS and not isinstance(value, bool):
            raise ArgumentError(f"{name} must be True or False, not {value!r}")
    if not isinstance(facts["casts"], (bool, type(None))):
        raise ArgumentError(f"casts must be True, False or None, not {facts['casts']!r}")
    for name in ("training", "dtype_eps"):
        if facts[name] is not None and not _is_position(facts[name]):
            raise ArgumentError(f"{name} must be the position of an argument, not {facts[name]!r}")
    fills = facts["fills"]
    if fills is not None and not (isinstance(fills, tuple) and all(map(_is_position, fills))):
        raise ArgumentError(f"fills must be a tuple of positions of arguments, not {fills!r}")
    dimensions = facts["dimensions"]
    names = getattr(dimensions, "names", dimensions)
    if dimensions is not None and not _names_dimensions(names):
        raise ArgumentError(f"dimensions must be like {{1: 'dim'}}, not {names!r}")


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _names_dimensions(names: object) -> bool:
    return isinstance(names, Mapping) and all(
        _is_position(position) and isinstance(name, str) for position, name in names.items()
    )
