"""The graph of an architecture: nodes that name their parameters and hold no weights.

Everything here is frozen and becomes plain JSON, so that a traced architecture can be saved,
compared and hashed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, TypeAlias, Union, cast

import torch
from torch import Tensor

from lipfast.errors import ArgumentError

ReferenceKind = Literal["node", "parameter", "constant", "batch", "dtype"]
_REFERENCE_KINDS: tuple[ReferenceKind, ...] = ("node", "parameter", "constant", "batch", "dtype")


@dataclass(frozen=True)
class Reference:
    """An argument that is looked up when the graph is evaluated.

    Attributes:
        kind: ``node`` (an earlier node), ``parameter`` (an entry of the state dict), ``constant``
            (a small tensor that the plan keeps), ``batch`` (the number of samples) or ``dtype``.
        name: what is looked up; for ``batch`` how many times that number (empty for once).
    """

    kind: ReferenceKind
    name: str = ""

    def __str__(self) -> str:
        return f"batch{'*' * bool(self.name)}{self.name}" if self.kind == "batch" else self.name


Argument: TypeAlias = Union[Reference, bool, int, float, str, tuple["Argument", ...], None]  # noqa: UP007


@dataclass(frozen=True)
class Node:
    """One operation of the graph.

    Attributes:
        name: unique in the graph.
        op: ATen operator without its overload such as ``aten.linear``; ``input`` for an input.
        args: positional arguments.
        kwargs: keyword arguments as pairs, sorted by name.
        shape: shape of the result for one sample (the batch dimension is left out).
        module: path of the module that the operation came from; empty for the root.
    """

    name: str
    op: str
    args: tuple[Argument, ...] = ()
    kwargs: tuple[tuple[str, Argument], ...] = ()
    shape: tuple[int, ...] = ()
    module: str = ""

    def references(self) -> Iterator[Reference]:
        """Every reference among the arguments, in order, nested ones included."""
        yield from _references(self.args)
        for _, value in self.kwargs:
            yield from _references(value)

    def names(self, kind: ReferenceKind) -> list[str]:
        """Names of what the arguments refer to of one kind, in order."""
        return [reference.name for reference in self.references() if reference.kind == kind]

    def reference(self, position: int) -> Reference:
        """The argument at `position`, where the op takes a tensor."""
        value = self.args[position]
        assert isinstance(value, Reference)
        return value

    def argument(self, position: int, name: str, default: Argument = None) -> Argument:
        """Return the argument at `position`, or by keyword, or its default."""
        if position < len(self.args):
            return self.args[position]
        return dict(self.kwargs).get(name, default)

    def operand(self, position: int, name: str) -> Reference | None:
        """The tensor at `position`, or by keyword; None where it is left out."""
        value = self.argument(position, name)
        return value if isinstance(value, Reference) else None

    def number(self, position: int, name: str, default: float) -> float:
        """The number at `position`, or by keyword, or its default."""
        value = self.argument(position, name, default)
        if value is None:
            return default
        if isinstance(value, (bool, int, float)):
            return float(value)
        raise ArgumentError(f"{self.op} in module '{self.module}': {name} is not a number: {value}")

    def integers(
        self, position: int, name: str, axes: int, default: int | None = None
    ) -> tuple[int, ...]:
        """One integer per axis, at `position` or by keyword; a single one stands for all axes."""
        value = self.argument(position, name)
        entries = value if isinstance(value, tuple) else (() if value is None else (value,))
        numbers = [int(entry) for entry in entries if isinstance(entry, (int, float))]
        if not numbers and default is not None:
            numbers = [default]
        if len(numbers) not in (1, axes) or len(numbers) < len(entries):
            raise ArgumentError(
                f"{self.op} in module '{self.module}': {name} is not {axes} integers: {value}"
            )
        return tuple(numbers * axes if len(numbers) == 1 else numbers)

    def dimensions(self, position: int, name: str) -> tuple[int, ...]:
        """One or several dimensions, at `position` or by keyword; empty if none is given."""
        value = self.argument(position, name)
        entries = value if isinstance(value, tuple) else (value,)
        return tuple(entry for entry in entries if isinstance(entry, int))

    def substituted(self, replacements: Mapping[str, Argument]) -> Node:
        """The node that reads `replacements` in the place of the nodes named there."""
        args = tuple(_substitute(value, replacements) for value in self.args)
        kwargs = tuple((key, _substitute(value, replacements)) for key, value in self.kwargs)
        return replace(self, args=args, kwargs=kwargs)

    def to_json(self) -> dict[str, Any]:
        """Encode as plain JSON."""
        return {
            "name": self.name,
            "op": self.op,
            "args": _argument_to_json(self.args),
            "kwargs": {key: _argument_to_json(value) for key, value in self.kwargs},
            "shape": list(self.shape),
            "module": self.module,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Node:
        """Invert `to_json`."""
        return Node(
            name=str(value["name"]),
            op=str(value["op"]),
            args=tuple(_argument_from_json(entry) for entry in value["args"]),
            kwargs=tuple(
                (key, _argument_from_json(entry)) for key, entry in sorted(value["kwargs"].items())
            ),
            shape=tuple(int(size) for size in value["shape"]),
            module=str(value["module"]),
        )

    def __str__(self) -> str:
        arguments = [_show(value) for value in self.args]
        arguments += [f"{key}={_show(value)}" for key, value in self.kwargs]
        return f"{self.name} = {self.op}({', '.join(arguments)})"


@dataclass(frozen=True)
class Constant:
    """A small tensor that belongs to the architecture and not to the state dict."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[float, ...]

    @staticmethod
    def from_tensor(tensor: Tensor) -> Constant:
        """Copy a tensor; float64 holds the entries of every floating dtype exactly."""
        values = tuple(float(value) for value in tensor.detach().flatten().tolist())
        return Constant(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), values)

    def tensor(self) -> Tensor:
        """Return the constant as a tensor of its own dtype, which is not to be changed."""
        return self._tensor

    @cached_property
    def _tensor(self) -> Tensor:
        dtype = cast(torch.dtype, getattr(torch, self.dtype))
        values = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        return values.reshape(self.shape).to(dtype)


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order (inputs first), and which of them are the outputs."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that are the inputs of the model."""
        return tuple(node for node in self.nodes if node.op == "input")

    @property
    def readers(self) -> dict[str, list[str]]:
        """Name of a node -> those that read its result, once for every time that they do."""
        found: dict[str, list[str]] = {}
        for node in self.nodes:
            for name in node.names("node"):
                found.setdefault(name, []).append(node.name)
        return found

    def node(self, name: str) -> Node:
        """Return the node of that name."""
        return self._by_name[name]

    def defining(self, argument: Argument) -> Node | None:
        """The node whose result an argument is."""
        if isinstance(argument, Reference) and argument.kind == "node":
            return self._by_name.get(argument.name)
        return None

    def rewritten(self, nodes: Sequence[Node]) -> Graph:
        """Other nodes between the same inputs and outputs, without those that nothing needs."""
        return Graph(needed(nodes, (*self.outputs, *(n.name for n in self.inputs))), self.outputs)

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}


def computed_name(node: str) -> str:
    """Name under which a computed tensor stands beside the state dict's."""
    return f"computed:{node}"


def is_computed(name: str) -> bool:
    """Whether a parameter is not in the state dict but computed from it."""
    return name.startswith("computed:")


def error_name(name: str) -> str:
    """Name of the tensor that bounds the rounding errors of a computed parameter."""
    return f"error of {name}"


def value_name(name: str) -> str:
    """Name of the constant that an entry of the state dict must equal."""
    return f"value of {name}"


def _references(value: Argument) -> Iterator[Reference]:
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from _references(entry)


def _show(value: Argument) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(entry) for entry in value) + "]"
    return str(value) if isinstance(value, Reference) else repr(value)


def is_floating_dtype(argument: Argument) -> bool:
    """Whether an argument is a floating dtype: a cast to it is an identity."""
    if not isinstance(argument, Reference) or argument.kind != "dtype":
        return False
    return bool(getattr(torch, argument.name).is_floating_point)


def needed(nodes: Sequence[Node], names: Iterable[str]) -> tuple[Node, ...]:
    """The nodes with these names and those that they depend on, in order."""
    wanted, found = set(names), []
    for node in reversed(nodes):
        if node.name in wanted:
            found.append(node)
            wanted.update(node.names("node"))
    return tuple(reversed(found))


def _substitute(value: Argument, replacements: Mapping[str, Argument]) -> Argument:
    """`value` with references to the nodes named in `replacements` replaced."""
    if isinstance(value, Reference) and value.kind == "node":
        return replacements.get(value.name, value)
    if isinstance(value, tuple):
        return tuple(_substitute(entry, replacements) for entry in value)
    return value


def _argument_to_json(value: Argument) -> Any:
    """Encode as plain JSON: references and non-finite numbers become one-key objects."""
    if isinstance(value, Reference):
        return {value.kind: value.name}
    if isinstance(value, tuple):
        return [_argument_to_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _argument_from_json(value: Any) -> Argument:
    """Invert `_argument_to_json`."""
    if isinstance(value, list):
        return tuple(_argument_from_json(entry) for entry in value)
    if isinstance(value, dict):
        ((kind, name),) = value.items()
        if kind == "float":
            return float(name)
        if kind not in _REFERENCE_KINDS:
            raise ValueError(f"unknown reference kind {kind!r}")
        return Reference(kind, str(name))
    return cast(Argument, value)
