"""Ctrl-C at a chosen line of lipfast's own code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

Trace = Callable[[FrameType, str, Any], Any]


class InterruptedAt:
    """Raises `KeyboardInterrupt` when a line of some files is about to run.

    Args:
        ends: how the names of the files end.
        numbers: of the lines, counted as they are run.

    Attributes:
        lines: how many have run.
        raised: how many interrupts there were.
    """

    def __init__(self, ends: tuple[str, ...], numbers: Collection[int] = ()) -> None:
        self._ends, self._numbers = ends, frozenset(numbers)
        self._earlier: Any = None
        self.lines = self.raised = 0

    def __enter__(self) -> InterruptedAt:
        self._earlier = sys.gettrace()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._earlier)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Trace | None:
        return self._line if frame.f_code.co_filename.endswith(self._ends) else None

    def _line(self, frame: FrameType, event: str, _: Any) -> Trace:
        if event == "line":
            self.lines += 1
            if self.lines in self._numbers:
                self.raised += 1
                raise KeyboardInterrupt
        return self._line
