"""Networks inside a file: weights below any keys, beside optimizers and other networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.stand_ins import MAX_NAME, StandIn, UnsafePickleError
from lipfast.checkpoints.words import WRAPPERS, is_state, standing
from lipfast.text import printable

_Named = TypeVar("_Named")

NUMBER = "a number"
"""The kind, in `Content.beside`, of a number."""

SINGLE = "a tensor of one number"
"""The kind, in `Content.beside`, of tensors without a dimension that count as metadata."""

STATE = "the state of an optimizer or the like by its name"
"""The kind, in `Content.beside`, of tensors that are left aside for the name above them alone."""

# After a dot or first: what torch.compile, FSDP and activation checkpointing add to names.
_LEVELS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of a GradScaler of torch, and of one loss of apex.
_SCALERS = (
    {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"},
    {"loss_scale", "unskipped"},
)
_MAX_DEPTH = 64
_MAX_PACKED = 64
_MAX_STATES = 8  # of a list that are looked at
# Bytes that a search takes for a value, and for a tensor: a hostile file may refer to one often.
_VALUE = 32
_TENSOR = 256
_FLOOR, _MOST = 16 << 20, 128 << 20


class Content(NamedTuple):
    """What lies in a file.

    Attributes:
        tensors: all that may be weights, under their full names: keys on the way, then their own.
        raw: scalars beside the weights.
        taken: what the names of the network begin with that is taken where nobody chooses.
        unread: further full names to kinds of tensors whose numbers are not read.
        beside: full names to kinds of all else that lies at the levels of tensors, but for texts.
        levels: beginnings of full names that are a dict or a list of the file.
    """

    tensors: dict[str, Tensor]
    raw: dict[str, Scalar]
    taken: str = ""
    unread: Mapping[str, str] = {}
    beside: Mapping[str, str] = {}
    levels: frozenset[str] = frozenset()


class NamesError(Exception):
    """Two weights have one name, or a name is longer than any is: says which."""


@dataclass
class _Level:
    """One dict of a file that holds tensors, or other levels that do.

    Of tensors whose numbers are not read it has the kind; `others` has that of all else.
    """

    content: Mapping[Any, Any]
    tensors: dict[str, Tensor | str] = field(default_factory=dict)
    inner: dict[str, _Level] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    def named(self, before: str = "") -> Iterator[tuple[str, Tensor | str]]:
        yield from ((f"{before}{name}", tensor) for name, tensor in self.tensors.items())
        for key, level in self.inner.items():
            yield from level.named(f"{before}{key}.")

    def beside(self, before: str = "") -> Iterator[tuple[str, str]]:
        yield from ((f"{before}{name}", kind) for name, kind in self.others.items())
        for key, level in self.inner.items():
            yield from level.beside(f"{before}{key}.")

    def levels(self, before: str = "") -> Iterator[str]:
        yield before
        for key, level in self.inner.items():
            yield from level.levels(f"{before}{key}.")

    @property
    def is_small(self) -> bool:
        """Whether it holds single numbers and states of generators only."""
        return STATE not in self.others.values() and all(
            isinstance(one, Tensor) and (one.dim() == 0 or one.dtype == torch.uint8)
            for _, one in self.named()
        )


def unwrapped(content: object, length: int = 0) -> Content:
    """Collect the weights of whatever a training script saved.

    Dicts and lists are searched to any depth that people use; states of optimizers, schedulers
    and generators are left out. Where several networks lie in one file, the one that is taken has
    the first of `WRAPPERS`; raw weights go before their averages (EMA, SWA), a student before its
    teacher, a generator before a discriminator, an actor before its critic; else the first does.

    Args:
        content: what was loaded.
        length: of the file, in bytes, which bounds what the search may take.

    Raises:
        UnsafePickleError: it is nested beyond what weights are.
        NamesError: names cannot tell its weights apart.

    Example:
        >>> import torch
        >>> w = {"weight": torch.eye(2)}
        >>> found = unwrapped({"ema": w, "model": w, "optimizer": {"a": w}, "epoch": 3})
        >>> list(found.tensors), found.taken, found.raw
        (['ema.weight', 'model.weight'], 'model.', {'epoch': 3})
    """
    top = _Search(_FLOOR + min(4 * length, _MOST)).level(content, (), 0)
    if top is None or not (top.tensors or top.inner):
        items = content.items() if isinstance(content, Mapping) else ()
        beside = dict(top.beside()) if top is not None else {}
        return Content({}, scalars(items, tensors=False), beside=beside)
    raw: dict[str, Scalar] = {}
    level, path = top, ""
    while True:
        key = _first(level)
        raw = {**scalars(level.content.items(), tensors=key is not None), **raw}
        if key is None:
            break
        level, path = level.inner[key], f"{path}{key}."
    found = _told_apart(top.named())
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    beside = dict(top.beside())
    own = {f"{path}{name}" for name in level.tensors}
    unread: dict[str, str] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            # in dicts below the weights that are taken they are no weights
            is_weight = name in own or not name.startswith(path)
            (unread if is_weight else beside)[name] = value
    return Content(tensors, raw, path, unread, beside, frozenset(top.levels()))


def without_levels(tensors: Mapping[str, _Named]) -> dict[str, _Named]:
    """Remove what `torch.compile`, FSDP and activation checkpointing add to names, wherever it is.

    The prefix `module.` of `DataParallel` stays: a model may well have a child of that name, so
    only a plan can tell, and does.

    Raises:
        NamesError: what is left is the name of another one.

    Example:
        >>> without_levels({"_orig_mod.encoder._fsdp_wrapped_module.weight": 1})
        {'encoder.weight': 1}
    """
    return _told_apart((without_level_names(name), tensor) for name, tensor in tensors.items())


def without_level_names(name: str) -> str:
    """Remove such levels from one name, or from the beginning of one."""
    return _LEVELS.sub("", name)


def _told_apart(named: Iterable[tuple[str, _Named]]) -> dict[str, _Named]:
    found: dict[str, _Named] = {}
    for name, value in named:
        if len(name) > MAX_NAME:
            raise NamesError(f"a name in it has {len(name)} characters")
        if name in found:
            raise _twice(name)
        found[name] = value
    return found


def _twice(name: str) -> NamesError:
    return NamesError(f"two weights in it are called '{printable(name[:200])}'")


def below(names: Iterable[str], prefix: str) -> list[str]:
    """Beginnings of names that end in a prefix, which may be several parts long: the best first.

    That is the prefix itself where names begin with it, else the order of `standing`.

    Example:
        >>> below(["state_dict.ema.0.weight", "model.0.weight"], "ema")
        ['state_dict.ema.']
    """
    wanted = f".{prefix.strip('.')}."
    found: dict[str, None] = {}
    for name in names:
        at = f".{name}".find(wanted)
        if at >= 0:
            found[name[: at + len(wanted) - 1]] = None
    return sorted(found, key=lambda one: (one != wanted[1:], standing(one)))


def holds_states(content: object) -> bool:
    """Whether something is the state of an optimizer, a scheduler or a generator, or has one.

    Example:
        >>> holds_states({"state": {}, "param_groups": []}), holds_states({"epoch": 3})
        (True, False)
    """
    if isinstance(content, (list, tuple)):  # of several optimizers; lists in it may be endless
        held = (part for part in content[:_MAX_STATES] if isinstance(part, Mapping))
        return any(map(holds_states, held))
    if not isinstance(content, Mapping):
        return False
    state = content.get("state")
    numbered = isinstance(state, Mapping) and any(isinstance(key, int) for key in state)
    return numbered or any(
        key in ("param_groups", "last_epoch") or (isinstance(key, str) and is_state(key))
        for key in content
    )


def _first(level: _Level) -> str | None:
    """Where to look for the weights: inside one of the inner levels, or here."""
    wrapper = next((key for key in WRAPPERS if key in level.inner), None)
    if wrapper is not None or level.tensors or not level.inner:
        return wrapper
    return min(level.inner, key=standing)


@dataclass
class _Search:
    """Of all levels of a file, in time and memory that are in proportion to its length."""

    left: int
    empty: set[int] = field(default_factory=set)

    def level(self, value: object, above: tuple[int, ...], before: int) -> _Level | None:
        """The level that a value is, below others; None where it holds no weights.

        Args:
            value: a dict, a list, or what may hold itself.
            above: identities of the levels above.
            before: characters of the names above.
        """
        own = id(value)  # what holds itself names nothing further
        if len(above) >= _MAX_DEPTH or own in above or own in self.empty:
            return None
        in_list = isinstance(value, (list, tuple))
        if isinstance(value, (list, tuple)):
            self._spend(_VALUE * len(value))
            value = {str(at): inner for at, inner in enumerate(value) if _counts_in_list(inner)}
        if not isinstance(value, Mapping) or _is_optimizer(value):
            return None
        self._spend(before + _VALUE * (1 + len(value)))
        found = _Level(value)
        for key, entry in value.items():
            name = str(key) if type(key) is int else key
            if not isinstance(name, str):
                continue
            length = before + len(name) + 1
            if isinstance(entry, Tensor) and isinstance(key, str) and not in_list:
                self._put(found, name, entry.detach(), length)
            elif (kind := _unread(entry)) is not None:
                self._put(found, name, kind, length)
            elif not _may_hold(entry):
                self._note(found, name, _kind(entry), length)
            elif not _is_known_state(name, entry):
                self._enter(found, name, entry, (*above, own), length)
        tensors = found.tensors.values()
        if found.inner and not any(isinstance(one, Tensor) and one.dim() for one in tensors):
            # the best accuracy, the number of averaged models: metadata
            kinds = {n: one if isinstance(one, str) else SINGLE for n, one in found.tensors.items()}
            found.tensors, found.others = {}, {**found.others, **kinds}
        if found.tensors or found.inner or STATE in found.others.values():
            return found
        self.empty.add(own)
        return None

    def _enter(
        self, level: _Level, name: str, entry: object, above: tuple[int, ...], length: int
    ) -> None:
        """Add what lies below a key to its level."""
        inner = self.level(entry, above, length)
        if inner is None:
            self._note(level, name, None if is_state(name) else _kind(entry), length)
        elif is_state(name):
            if not inner.is_small:
                self._note(level, name, STATE, length)
        elif inner.tensors or inner.inner:
            if name in level.inner:  # a number and the same one as a text
                raise _twice(name)
            level.inner[name] = inner
        else:
            for key, kind in inner.others.items():
                self._note(level, f"{name}.{key}", kind, length + len(key) + 1)

    def _put(self, level: _Level, name: str, tensor: Tensor | str, length: int) -> None:
        if length - 1 > MAX_NAME:
            raise NamesError(f"a name in it has {length - 1} characters")
        if name in level.tensors:
            raise _twice(name)
        self._spend(_TENSOR + length)
        level.tensors[name] = tensor

    def _note(self, level: _Level, name: str, kind: str | None, length: int) -> None:
        if kind is not None and length <= MAX_NAME:  # a longer one is no name of a weight's part
            self._spend(_VALUE + length)
            level.others[name] = kind

    def _spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UnsafePickleError("nested beyond what weights are")


def _is_optimizer(value: Mapping[Any, Any]) -> bool:
    return "param_groups" in value and "state" in value


def _is_known_state(key: str, value: Any) -> bool:
    """Whether something is by its content the state of an optimizer, a scheduler, a scaler."""
    if isinstance(value, (list, tuple)):
        return 0 < len(value) <= _MAX_STATES and all(
            isinstance(one, Mapping) and _is_known_state("", one) for one in value
        )
    if not isinstance(value, Mapping):
        return False
    if key == "state" and value and all(type(one) is int for one in value):
        return True
    return (
        _is_optimizer(value)
        or ("last_epoch" in value and ("base_lrs" in value or "_step_count" in value))
        or any(len(value) == len(keys) and all(k in keys for k in value) for keys in _SCALERS)
    )


def _kind(value: object) -> str | None:
    """What something is that is no tensor; None where it cannot be a part of a function."""
    if value is None or isinstance(value, (str, bool, bytes)):
        return None
    if isinstance(value, (int, float)):
        return NUMBER
    if isinstance(value, StandIn):
        return f"of class {value.name[:200]}"
    if isinstance(value, (Mapping, list, tuple)) and not value:
        return None
    return f"a {type(value).__name__}"


def _unread(value: object) -> str | None:
    """The kind of a tensor that is not read; packed parameters are a tuple with one."""
    parts = value[:_MAX_PACKED] if isinstance(value, tuple) else (value,)
    found = (part.name for part in parts if isinstance(part, StandIn) and part.is_tensor)
    return next(found, None)


def _may_hold(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _counts_in_list(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple, Tensor))
