"""Numbers, texts and booleans out of whatever a training script saved beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lipfast.checkpoints.metadata import Scalar

SETTINGS = (
    "hyper_parameters",
    "hparams",
    "config",
    "args",
    "metadata",
    "metrics",
    "hyperparameters",
)
"""Keys below which one more level is looked at."""

_MAX_BITS = 1024  # of an integer; json refuses very long ones
_MAX_TEXT = 1 << 16  # characters; longer ones are no setting
_MAX_KEYS = 10_000
_MAX_TEXTS = 1 << 22  # characters of all of them; a hostile file may refer to one over and over


def scalars(items: Iterable[tuple[Any, Any]], *, tensors: bool) -> dict[str, Scalar]:
    """Collect scalars, and those one level below the keys in `SETTINGS`.

    Only one level: a hostile file may refer to one dict from itself, or a thousand times.

    Args:
        items: keys and values; keys that are no text are left out.
        tensors: whether tensors of one number count.

    Example:
        >>> scalars({"epoch": 3, "config": {"width": 64}, "history": [1]}.items(), tensors=False)
        {'epoch': 3, 'width': 64}
    """
    found: dict[str, Scalar] = {}
    left = _MAX_TEXTS
    nested: list[Mapping[Any, Any]] = []
    for key, value in items:
        if not isinstance(key, str) or len(found) >= _MAX_KEYS:
            continue
        if isinstance(value, Mapping):
            nested += [value] if key in SETTINGS else []
            continue
        scalar = _scalar(value, tensors=tensors)
        left -= len(scalar) if isinstance(scalar, str) else 0
        if scalar is not None and left >= 0:
            found[key] = scalar
    for level in nested:
        for key, value in level.items():
            scalar = _scalar(value, tensors=True)
            left -= len(scalar) if isinstance(scalar, str) else 0
            if isinstance(key, str) and scalar is not None and len(found) < _MAX_KEYS and left >= 0:
                found.setdefault(key, scalar)
    return found


def _scalar(value: object, *, tensors: bool) -> Scalar | None:
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return None
    if isinstance(value, str):
        return value if len(value) <= _MAX_TEXT else None
    if isinstance(value, (bool, int, float)):
        return value
    if tensors and isinstance(value, Tensor) and value.dim() == 0 and not value.is_complex():
        item = None if value.is_meta else value.item()
        return item if isinstance(item, (bool, int, float)) else None
    return None
