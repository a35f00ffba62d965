"""The metadata of a checkpoint: run, step, epoch, hyper-parameters and metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

from lipfast.text import strict_json, to_utf8

Scalar: TypeAlias = "bool | int | float | str"

_WHOLE_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")
_NON_FINITE = re.compile(r"[+-]?(nan|inf|infinity)\Z", re.IGNORECASE)
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_JSON = json.JSONEncoder(separators=(",", ":"))  # `json.dumps` makes one for every line
_MAX_VALUE_LENGTH = 4000  # int() refuses longer ones, and takes quadratic time

STEP_KEYS = ("step", "global_step", "global_steps", "iteration")
INT64_MAX = 2**63 - 1


def parse_value(text: str) -> Scalar:
    """Turn text into a boolean, an integer or a float where it spells one.

    Args:
        text: a value as a safetensors header or a command line has it.

    Returns:
        The value. Leading zeros, underscores and other spellings that Python's own conversions
        accept stay text: they are names more often than numbers.

    Example:
        >>> [parse_value(text) for text in ("64", "5e-3", "true", "relu", "007", "nan")]
        [64, 0.005, True, 'relu', '007', nan]
    """
    return text if len(text) > _MAX_VALUE_LENGTH else _short_value(text)


@lru_cache(maxsize=1 << 14)  # of short texts: it must not keep what hostile files hold
def _short_value(text: str) -> Scalar:
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _WHOLE_NUMBER.match(text):
        return int(text)
    zeros = text.lstrip("+-")[:2]
    is_name = len(zeros) == 2 and zeros[0] == "0" and zeros[1].isdigit()
    is_float = (_FLOAT.match(text) and not is_name) or _NON_FINITE.match(text)
    return float(text) if is_float else text


@dataclass(frozen=True)
class Metadata:
    """What a checkpoint says about itself.

    Attributes:
        raw: keys and values as stored; a safetensors header holds text only.
        folder: the run's name where `raw` has no key `run`.

    Example:
        >>> metadata = Metadata({"step": "100", "width": "64", "loss": "ce"}, folder="w64")
        >>> metadata.run, metadata.step, metadata.epoch, metadata.values["width"]
        ('w64', 100, None, 64)
    """

    raw: Mapping[str, Scalar]
    folder: str = ""

    @cached_property
    def values(self) -> dict[str, Scalar]:
        """The metadata with numbers and booleans parsed."""
        return {
            key: parse_value(value) if isinstance(value, str) else value
            for key, value in self.raw.items()
        }

    @property
    def run(self) -> str:
        """The name of the training run."""
        return str(self.raw.get("run", self.folder))

    @property
    def step(self) -> int | None:
        """Optimiser steps taken, from the first of `STEP_KEYS` that is there."""
        values = self.values
        for key in STEP_KEYS:
            value = values.get(key)
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= INT64_MAX:
                return value
        return None

    @property
    def epoch(self) -> float | None:
        """Epochs trained, possibly fractional."""
        value = self.values.get("epoch")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        try:
            return float(value)
        except OverflowError:
            return None

    def to_json(self) -> str:
        """One line of strict JSON; non-finite numbers are the texts `nan`, `inf` and `-inf`."""
        return _JSON.encode(
            {
                to_utf8(key): to_utf8(value) if isinstance(value, str) else strict_json(value)
                for key, value in self.values.items()
            }
        )
