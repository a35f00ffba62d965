"""Networks inside a file: weights below any keys, beside optimizers and other networks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.scalars import scalars
from lipfast.checkpoints.stand_ins import StandIn

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
_MAX_DEPTH = 8
_MAX_PACKED = 64
_MAX_VALUES = 1_000_000  # dicts and tensors; a hostile file may refer to one a thousand times


class Content(NamedTuple):
    """What lies in a file.

    Attributes:
        tensors: all that may be weights, under their full names: keys on the way, then their own.
        raw: scalars beside the weights.
        taken: what the names of the network begin with that is taken where nobody chooses.
        unread: names in that network to kinds of tensors whose numbers are not read.
    """

    tensors: dict[str, Tensor]
    raw: dict[str, Scalar]
    taken: str = ""
    unread: Mapping[str, str] = {}


class TooManyValuesError(Exception):
    """More values than weights have."""


@dataclass
class _Level:
    """One dict of a file that holds tensors, or other levels that do."""

    content: Mapping[Any, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    inner: dict[str, _Level] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)

    def named(self, before: str = "") -> Iterator[tuple[str, Tensor]]:
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
        TooManyValuesError: it is nested beyond what weights are.

    Example:
        >>> import torch
        >>> w = {"weight": torch.eye(2)}
        >>> found = unwrapped({"ema": w, "model": w, "optimizer": {"a": w}, "epoch": 3})
        >>> list(found.tensors), found.taken, found.raw
        (['ema.weight', 'model.weight'], 'model.', {'epoch': 3})
    """
    top = _level(content, _MAX_DEPTH, [_MAX_VALUES])
    if top is None:
        items = content.items() if isinstance(content, Mapping) else ()
        return Content({}, scalars(items, tensors=False))
    raw: dict[str, Scalar] = {}
    level, path = top, ""
    while True:
        key = _first(level)
        raw = {**scalars(level.content.items(), tensors=key is not None), **raw}
        if key is None:
            return Content(dict(top.named()), raw, path, level.unread)
        level, path = level.inner[key], f"{path}{key}."


def without_levels(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove what `torch.compile`, FSDP and activation checkpointing add to names, wherever it is.

    The prefix `module.` of `DataParallel` stays: a model may well have a child of that name, so
    only a plan can tell, and does.

    Example:
        >>> import torch
        >>> list(without_levels({"_orig_mod.encoder._fsdp_wrapped_module.weight": torch.zeros(1)}))
        ['encoder.weight']
    """
    return {_LEVELS.sub("", name): tensor for name, tensor in tensors.items()}


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
    if isinstance(content, (list, tuple)):
        return any(map(holds_states, content[:_MAX_DEPTH]))
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


def _level(value: object, depth: int, left: list[int]) -> _Level | None:
    if isinstance(value, (list, tuple)):
        value = {str(index): inner for index, inner in enumerate(value) if _may_hold(inner)}
    if not isinstance(value, Mapping) or not depth or "param_groups" in value:
        return None
    level = _Level(value)
    left[0] -= 1 + len(value)
    if left[0] < 0:
        raise TooManyValuesError
    for key, entry in value.items():
        if not isinstance(key, str):
            continue
        if isinstance(entry, Tensor):
            level.tensors[key] = entry.detach()
        elif (kind := _unread(entry)) is not None:
            level.unread[key] = kind
        elif _may_hold(entry) and not is_state(key):
            inner = _level(entry, depth - 1, left)
            if inner is not None:
                level.inner[key] = inner
    if level.inner and all(tensor.dim() == 0 for tensor in level.tensors.values()):
        level.tensors = {}  # the best accuracy, the number of averaged models: metadata
    return level if level.tensors or level.inner or level.unread else None


def _unread(value: object) -> str | None:
    """The kind of a tensor that is not read; packed parameters are a tuple with one."""
    parts = value[:_MAX_PACKED] if isinstance(value, tuple) else (value,)
    found = (part.name for part in parts if isinstance(part, StandIn) and part.is_tensor)
    return next(found, None)


def _may_hold(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))
