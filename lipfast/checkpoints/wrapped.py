"""Networks inside a file: weights below any keys, beside optimizers and other networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.stand_ins import MAX_NAME, StandIn, UnsafePickleError
from lipfast.text import printable

_Named = TypeVar("_Named")

WRAPPERS = (
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "weights"),
    *("params", "model_state", "model_weights", "net_state_dict", "generator", "netG"),
)
"""Keys under which training scripts keep the weights inside a larger dict: the first goes first."""

# After a dot or first: what torch.compile, FSDP and activation checkpointing add to names.
_LEVELS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_STATE_KEYS = re.compile(
    r"opt|optim.*|.*optimi[sz]er.*|.*sched.*|.*scaler.*|.*rng.*|random_states?|callbacks|loops",
    re.IGNORECASE,
)
_SECOND = re.compile(
    r"(?:.*_)?(?:teacher|target|critic|value|discriminator|momentum|old|best)(?:_.*|\d*)|(?:net_?)?d",
    re.IGNORECASE,
)
_AVERAGE = re.compile(r"(?:.*_)?(?:ema|averaged?|avg|swa|shadow|polyak)(?:_.*|\d*)", re.IGNORECASE)
_MAX_DEPTH = 64
_MAX_PACKED = 64
_MAX_STATES = 8  # of a list that are looked at
_MAX_VALUES = 1_000_000  # dicts and tensors; a hostile file may refer to one a thousand times


class Content(NamedTuple):
    """What lies in a file.

    Attributes:
        tensors: all that may be weights, under their full names: keys on the way, then their own.
        raw: scalars beside the weights.
        taken: what the names of the network begin with that is taken where nobody chooses.
        unread: further full names to kinds of tensors whose numbers are not read.
    """

    tensors: dict[str, Tensor]
    raw: dict[str, Scalar]
    taken: str = ""
    unread: Mapping[str, str] = {}


class NamesError(Exception):
    """Two weights have one name, or a name is longer than any is: says which."""


@dataclass
class _Level:
    """One dict of a file that holds tensors, or other levels that do.

    Of tensors whose numbers are not read it has the kind.
    """

    content: Mapping[Any, Any]
    tensors: dict[str, Tensor | str] = field(default_factory=dict)
    inner: dict[str, _Level] = field(default_factory=dict)

    def named(self, before: str = "") -> Iterator[tuple[str, Tensor | str]]:
        yield from ((f"{before}{name}", tensor) for name, tensor in self.tensors.items())
        for key, level in self.inner.items():
            yield from level.named(f"{before}{key}.")


def unwrapped(content: object) -> Content:
    """Collect the weights of whatever a training script saved.

    Dicts and lists are searched to any depth that people use; states of optimizers, schedulers
    and generators are left out. Where several networks lie in one file, the one that is taken has
    the first of `WRAPPERS`; raw weights go before their averages (EMA, SWA), a student before its
    teacher, a generator before a discriminator, an actor before its critic; else the first does.

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
    top = _Search().level(content, ())
    if top is None:
        items = content.items() if isinstance(content, Mapping) else ()
        return Content({}, scalars(items, tensors=False))
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
    own = {f"{path}{name}" for name in level.tensors}
    unread = {
        name: value
        for name, value in found.items()
        # in dicts below the weights that are taken they are no weights
        if isinstance(value, str) and (name in own or not name.startswith(path))
    }
    return Content(tensors, raw, path, unread)


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
    return _told_apart((_LEVELS.sub("", name), tensor) for name, tensor in tensors.items())


def _told_apart(named: Iterable[tuple[str, _Named]]) -> dict[str, _Named]:
    found: dict[str, _Named] = {}
    for name, value in named:
        if len(name) > MAX_NAME:
            raise NamesError(f"a name in it has {len(name)} characters")
        if name in found:
            raise NamesError(f"two weights in it are called '{printable(name[:200])}'")
        found[name] = value
    return found


def below(names: Iterable[str], prefix: str) -> list[str]:
    """Beginnings of names that end in a prefix, which may be several parts long: the best first.

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
    return sorted(found, key=standing)


def standing(prefix: str) -> tuple[int, int]:
    """The documented order of networks: raw before second ones before averages; by `WRAPPERS`.

    Example:
        >>> sorted(["ema.", "teacher.", "student.", "model."], key=standing)
        ['model.', 'student.', 'teacher.', 'ema.']
    """
    keys = prefix.strip(".").split(".")
    if any(_AVERAGE.fullmatch(key) for key in keys):
        rank = 2
    else:
        rank = int(any(_SECOND.fullmatch(key) for key in keys))
    return rank, WRAPPERS.index(keys[0]) if keys[0] in WRAPPERS else len(WRAPPERS)


def is_state(key: str) -> bool:
    """Whether a key names the state of an optimizer, a scheduler or a generator."""
    return _STATE_KEYS.fullmatch(key) is not None


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
    """Of all levels of a file, in time that is in proportion to what is found."""

    left: int = _MAX_VALUES
    empty: set[int] = field(default_factory=set)

    def level(self, value: object, above: tuple[int, ...]) -> _Level | None:
        """The level that a value is, below others; None where it holds no weights."""
        own = id(value)  # what holds itself names nothing further
        if len(above) >= _MAX_DEPTH or own in above or own in self.empty:
            return None
        if isinstance(value, (list, tuple)):
            value = {str(index): inner for index, inner in enumerate(value) if _may_hold(inner)}
        if not isinstance(value, Mapping) or "param_groups" in value:
            return None
        self.left -= 1 + len(value)
        if self.left < 0:
            raise UnsafePickleError("nested beyond what weights are")
        found = _Level(value)
        for key, entry in value.items():
            if not isinstance(key, str):
                continue
            if isinstance(entry, Tensor):
                found.tensors[key] = entry.detach()
            elif (kind := _unread(entry)) is not None:
                found.tensors[key] = kind
            elif _may_hold(entry) and not is_state(key):
                inner = self.level(entry, (*above, own))
                if inner is not None:
                    found.inner[key] = inner
        tensors = found.tensors.values()
        if found.inner and not any(isinstance(one, Tensor) and one.dim() for one in tensors):
            found.tensors = {}  # the best accuracy, the number of averaged models: metadata
        if found.tensors or found.inner:
            return found
        self.empty.add(own)
        return None


def _unread(value: object) -> str | None:
    """The kind of a tensor that is not read; packed parameters are a tuple with one."""
    parts = value[:_MAX_PACKED] if isinstance(value, tuple) else (value,)
    found = (part.name for part in parts if isinstance(part, StandIn) and part.is_tensor)
    return next(found, None)


def _may_hold(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))
