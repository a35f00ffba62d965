"""What stands for a thing in a pickle that is neither a plain value nor a tensor: inert records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_MAX_PARTS = 200_000  # of all modules, those counted twice that are there twice
_MAX_MODULE_DEPTH = 64  # of modules in modules
MAX_NAME = 1024
"""Characters of a weight's name; a hostile file may have one long key above many tensors."""


class UnsafePickleError(Exception):
    """Loading would take memory or time out of proportion."""


class MoreThanWeightsError(Exception):
    """A pickle that was made to run code, or that holds no weights: says what it names."""


class OtherFormatError(Exception):
    """A file of another kind: says which, and what to do."""


class Global:
    """A name that a pickle would import: it never is."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class StandIn(Mapping[str, Any]):
    """An object of a class that is not known: what the pickle says of it, and nothing done.

    As a mapping it has what a checkpoint's reader looks for: of a pickled module its state dict, of
    an own kind of dict its items, of any other object its attributes that are no containers.

    Attributes:
        name: of the class or function.
        args: that it would be called with.
        state: that it would be given, most often its `__dict__`.
        items_set: as an own kind of dict would hold them.
        place: in the pickle's memo.
    """

    __slots__ = ("_entries", "args", "items_set", "name", "place", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items_set: dict[Any, Any] | None = None
        self.place: int | None = None
        self._entries: Mapping[Any, Any] | None = None

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:  # never the content: it may hold itself
        return f"<{type(self).__name__} {self.name[:200]}>"

    def __getitem__(self, key: str) -> Any:
        return self.entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def attributes(self) -> Mapping[Any, Any]:
        """Its `__dict__`, as far as the pickle says."""
        state = self.state
        if isinstance(state, tuple) and state:  # with __slots__: a pair of dicts
            state = state[0]
        return state if isinstance(state, dict) else {}

    @property
    def is_module(self) -> bool:
        """Whether it is an `nn.Module`, or one of TorchScript."""
        held = self.attributes
        of_torch = isinstance(held.get("_parameters"), dict) and "_modules" in held
        return of_torch or self.name.startswith("__torch__.")

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor of a kind that is not read, such as a `ShardedTensor`."""
        return self.name.endswith("Tensor") and not self.is_module

    @property
    def entries(self) -> Mapping[Any, Any]:
        """The mapping that it is read as."""
        if self._entries is None:
            if self.is_module:
                self._entries = _module_state(self)
            elif self.items_set is not None:
                self._entries = self.items_set
            else:
                self._entries = _plain_attributes(self)
        return self._entries


class NoTensor(StandIn):
    """A tensor whose numbers lipfast does not read; `name` says of which kind it is."""

    __slots__ = ()
    is_tensor = True


def _plain_attributes(thing: StandIn) -> dict[str, Any]:
    """The attributes of a namespace, a dataclass, or a configuration of OmegaConf."""
    held = thing.attributes
    content = held.get("_content")
    found = {}
    for key, value in (content if isinstance(content, dict) else held).items():
        if isinstance(value, StandIn):  # OmegaConf wraps each value in a node
            value = value.attributes.get("_val")  # noqa: PLW2901
        if isinstance(key, str) and value is not None and not isinstance(value, (Tensor, Mapping)):
            found[key] = value
    return found


def _module_state(root: StandIn) -> dict[str, Any]:
    """Parameters and persistent buffers by name, as `nn.Module.state_dict` lists them.

    Raises:
        UnsafePickleError: modules hold one another without end.
    """
    found: dict[str, Any] = {}
    pending = [("", root, 0)]
    parts = 0
    while pending:
        prefix, module, depth = pending.pop()
        held = module.attributes
        dicts: list[Mapping[Any, Any]]
        dicts = [value for key in _HELD if isinstance(value := held.get(key), dict)]
        if module.name.startswith("__torch__."):  # TorchScript: all of them are attributes
            dicts = [held]
        parts += 1 + sum(map(len, dicts))
        if parts > _MAX_PARTS or depth > _MAX_MODULE_DEPTH or len(prefix) > MAX_NAME:
            raise UnsafePickleError("its modules hold one another without end")
        passing = held.get("_non_persistent_buffers_set")
        children = []
        for name, value in (pair for one in dicts for pair in one.items()):
            if isinstance(value, (Tensor, NoTensor)):
                if not (isinstance(passing, list) and name in passing):
                    found[f"{prefix}{name}"] = value
            elif isinstance(value, StandIn) and value.is_module:
                children.append((f"{prefix}{name}.", value, depth + 1))
        pending += reversed(children)
    return found


_HELD = ("_parameters", "_buffers", "_modules")
