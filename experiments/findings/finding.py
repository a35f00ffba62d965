"""What the report needs of a study: its question, how it is evaluated and drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from experiments.findings.sources import Sources
from experiments.results import Results

HELD, PARTLY, NOT_HELD, NOT_RUN = "held", "partly", "did not hold", "not run"


@dataclass(frozen=True)
class Check:
    """One claim beside what was measured here.

    Attributes:
        claim: in words, with the criterion that decides.
        paper: the study's own number, or where it says so; "-" where there is none.
        ours: what was measured, formatted.
        held: whether the criterion is met.
    """

    claim: str
    paper: str
    ours: str
    held: bool


@dataclass(frozen=True)
class Outcome:
    """What the numbers of a study say.

    Attributes:
        checks: at least one.
        headline: the one number that says most, with its words.
        notes: sentences that qualify the result, computed too.
        table: heading row and rows of further numbers, or empty.
    """

    checks: tuple[Check, ...]
    headline: str
    notes: tuple[str, ...] = ()
    table: tuple[tuple[str, ...], ...] = ()

    @property
    def verdict(self) -> str:
        """Whether all, some or none of the checks held."""
        held = sum(check.held for check in self.checks)
        if held == len(self.checks):
            return HELD
        return PARTLY if held else NOT_HELD


@dataclass(frozen=True)
class Finding:
    """A row of the report.

    Attributes:
        id: for example C1.
        name: of its file in `experiments/configs`.
        title: of its section.
        question: that it asks.
        source: where the paper treats it, or that it goes beyond it.
        collect: from stored runs to rows of numbers or text.
        evaluate: from results to checks.
        draw: from results to the figure.
    """

    id: str
    name: str
    title: str
    question: str
    source: str
    collect: Callable[[Sources], Iterable[Mapping[str, Any]]]
    evaluate: Callable[[Results], Outcome]
    draw: Callable[[Results], Figure]
