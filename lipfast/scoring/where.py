"""Conditions on the metadata of checkpoints, as a user types them: `step >= 1000`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lipfast.checkpoints import Metadata, parse_value
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import ArgumentError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*(?P<key>[^<>=!]+?)\s*(?P<op><=|>=|!=|==|=|<|>)\s*(?P<value>.*?)\s*")


@dataclass(frozen=True)
class Condition:
    """One comparison of a metadata key with a value.

    Attributes:
        key: of the metadata; `run`, `step` and `epoch` as the store has them.
        operator: one of <= >= != = == < >.
        value: what it is compared with.
    """

    key: str
    operator: str
    value: Scalar

    def holds(self, metadata: Metadata) -> bool:
        """Whether a checkpoint satisfies it; one without the key does not.

        Numbers are compared as numbers, anything else as text, and only for equality.
        """
        found = _lookup(metadata, self.key)
        if found is None:
            return False
        compare = _OPERATORS[self.operator]
        if _is_number(found) and _is_number(self.value):
            return compare(found, self.value)
        if self.operator in ("=", "==", "!="):
            return compare(_as_text(found), _as_text(self.value))
        return False


@dataclass(frozen=True)
class Where:
    """Conditions that must all hold.

    Example:
        >>> where = Where.parse(["step >= 100", "optimizer = adam"])
        >>> where.holds(Metadata({"step": "200", "optimizer": "adam"}))
        True
        >>> where.holds(Metadata({"step": "200"}))
        False
    """

    conditions: tuple[Condition, ...] = ()

    @staticmethod
    def parse(texts: str | Sequence[str]) -> Where:
        """Parse conditions.

        Raises:
            ArgumentError: a text is no comparison.
        """
        texts = [texts] if isinstance(texts, str) else texts
        return Where(tuple(_condition(text) for text in texts))

    def holds(self, metadata: Metadata) -> bool:
        """Whether a checkpoint satisfies all conditions."""
        return all(condition.holds(metadata) for condition in self.conditions)

    def known(self, metadata: Mapping[str, Scalar]) -> bool | None:
        """Answer without reading a file, as far as this metadata allows; None where it does not."""
        partial = Metadata(metadata)
        unknown = False
        for condition in self.conditions:
            if condition.key not in metadata:
                unknown = True
            elif not condition.holds(partial):
                return False
        return None if unknown else True


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text) if isinstance(text, str) else None
    if match is None or not match["value"]:
        raise ArgumentError(
            f"where {text!r}: expected KEY OP VALUE with OP one of {', '.join(_OPERATORS)}, for "
            "instance 'step >= 1000'"
        )
    return Condition(match["key"], match["op"], parse_value(match["value"].strip("'\"")))


def _lookup(metadata: Metadata, key: str) -> Scalar | None:
    special = {"run": metadata.run or None, "step": metadata.step, "epoch": metadata.epoch}
    found = special.get(key)
    return metadata.values.get(key) if found is None else found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_text(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
