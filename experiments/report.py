"""The report `docs/study.md`: every row of the study, from stored results.

Nothing in it is typed by hand: numbers, verdicts and figures come from `experiments/results`, the
settings from the runs and, for the paper's own scale, from `experiments/configs`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.config import SweepConfig
from experiments.errors import ConfigError
from experiments.files import write_whole
from experiments.findings import BY_STUDY, FINDINGS, Finding, Outcome
from experiments.findings.finding import HELD, NOT_HELD, NOT_RUN, PARTLY
from experiments.results import RESULTS_FOLDER, Results, read_results, results_path
from experiments.study import load_study
from lipfast.errors import StoreError

_REPOSITORY = Path(__file__).parent.parent
REPORT = _REPOSITORY / "docs" / "study.md"
FIGURES = _REPOSITORY / "docs" / "figures"

# Settings that say nothing about what is studied.
_SILENT = {
    *("name", "scale", "variant", "checkpoints", "format", "log_points", "path_length"),
    *("data_folder", "data_seed", "stop_every", "penalty_samples"),
}
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(SweepConfig)
    if field.default is not dataclasses.MISSING
}

_REPORT_HEAD = """\
# The study

Every row of the study of Khromov and Singh, *Some Fundamental Aspects about Lipschitz Continuity of
Neural Networks*, ICLR 2024 (arXiv 2302.10886), asked again with lipfast, and some questions beyond
it. This page is written by `python -m experiments report` from the results in
`experiments/results`; numbers and verdicts are computed, none is typed.

"Lower bound" is the paper's: the largest spectral norm of the Jacobian over the training samples.
"Upper bound" is the product of the layers' norms, certified; where a setting says `upper`
quadratic, the smaller of that and of [quadratic constraints](upper-bounds.md). Curves are means
over seeds, bands one standard deviation, rings mark peaks, dashed vertical lines the width from
which on every run fits its training labels, dotted curves means without networks that learnt
nothing. How the small settings came about, and what was changed after results had been seen, is
said in
[experiments.md](experiments.md#how-the-small-settings-came-about).

A claim **held** if all criteria of its section are met here, **partly** if some are, and **did not
hold** if none is: a partial verdict may rest on one criterion, so its number is given. The criteria
stand in the sections. {scale}

"""
_LAPTOP = (
    "The runs are small (the scale `laptop`: minutes on two cores, mostly 400 noisy samples of "
    "MNIST1D and Adam), so a claim that did not hold here may hold at the paper's scale; each "
    "configuration has that scale too: `python -m experiments run C1-width-fcn-ce --scale paper`."
)


@dataclass(frozen=True)
class Section:
    """A row of the report.

    Attributes:
        finding: what is asked.
        results: None where the study has not been run.
        outcome: None likewise.
    """

    finding: Finding
    results: Results | None
    outcome: Outcome | None

    @property
    def verdict(self) -> str:
        """Whether the claims held: all, some, none, or not run."""
        return NOT_RUN if self.outcome is None else self.outcome.verdict


def read_sections(folder: Path = RESULTS_FOLDER) -> list[Section]:
    """Read and evaluate the results of all studies, in the order of the report.

    Raises:
        StoreError: a file of results is damaged.
    """
    sections = []
    for finding in FINDINGS:
        results = read_results(finding.name, folder)
        outcome = None if results is None else finding.evaluate(results)
        sections.append(Section(finding, results, outcome))
    return sections


def _setting_text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(_setting_text(entry) for entry in value)
    return str(value)


def describe_settings(sweeps: Mapping[str, Mapping[str, Any]]) -> str:
    """Say the settings of one or several sweeps in a line, with the keys of the TOML file.

    Settings at their defaults are left out; what differs between sweeps is listed per sweep.

    Args:
        sweeps: label to settings.

    Example:
        >>> describe_settings({"a/x": {"lr": 0.1, "steps": 5}, "a/y": {"lr": 0.2, "steps": 5}})
        '`lr` 0.1 (x), 0.2 (y); `steps` 5'
    """
    keys = list(dict.fromkeys(key for settings in sweeps.values() for key in settings))
    parts = []
    for key in keys:
        values = {
            label.rpartition("/")[2]: _setting_text(settings.get(key, _DEFAULTS.get(key)))
            for label, settings in sweeps.items()
        }
        different = set(values.values())
        if key in _SILENT or different == {_setting_text(_DEFAULTS.get(key))}:
            continue
        if len(different) == 1:
            parts.append(f"`{key}` {different.pop()}")
            continue
        same: dict[str, list[str]] = {}
        for label, value in values.items():
            same.setdefault(value, []).append(label)
        listed = (f"{value} ({', '.join(labels)})" for value, labels in same.items())
        parts.append(f"`{key}` " + ", ".join(listed))
    return "; ".join(parts)


def _configured(name: str, scale: str) -> str | None:
    """The settings of a scale in the TOML files, None where there is none."""
    try:
        study = load_study(name, scale)
    except ConfigError:
        return None
    labelled = {
        f"{study.name}/{sweep.variant}" if sweep.variant else study.name: sweep.settings()
        for sweep in study.sweeps
    }
    text = describe_settings(labelled) if labelled else ""
    used = f"sweeps of {', '.join(study.uses)}" if study.uses else ""
    return "; ".join(part for part in (text, used) if part)


def _by_study(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label, values in settings.items():
        found.setdefault(label.partition("/")[0], {})[label] = values
    return found


def _settings_lines(section: Section) -> list[str]:
    lines = []
    name = section.finding.name
    if section.results is not None:
        for study, sweeps in _by_study(section.results.settings).items():
            owner = "" if study == name else f", sweeps of {study}"
            text = describe_settings(sweeps)
            lines.append(f"*Setting here* ({section.results.scale}{owner}): {text}.")
    paper = _configured(name, "paper")
    if paper is not None:
        beyond = section.finding.source.startswith("beyond the paper")
        whose = "At the scale `paper`" if beyond else "Setting of the paper"
        lines.append(f"*{whose}*: {paper}.")
    return lines


def markdown_table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a table; a vertical bar in a cell is escaped.

    Example:
        >>> markdown_table(["a", "b"], [["1", "2"]])
        ['| a | b |', '| --- | --- |', '| 1 | 2 |']
    """

    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("|", "\\|") for cell in cells)
        return "| " + " | ".join(escaped) + " |"

    head = list(heading)
    return [line(head), line("---" for _ in head), *(line(row) for row in rows)]


def anchor(finding: Finding) -> str:
    """The anchor of a section's heading, as GitHub makes it."""
    text = f"{finding.id}: {finding.title}".lower()
    return "".join(c for c in text if c.isalnum() or c in " -").replace(" ", "-")


def figure_name(finding: Finding) -> str:
    """The file name of a section's figure."""
    return f"study-{finding.name}.png"


def _met(outcome: Outcome | None) -> str:
    checks = outcome.checks if outcome else ()
    return f"{sum(check.held for check in checks)} of {len(checks)}"


def summary_lines(sections: Iterable[Section]) -> list[str]:
    """The table on top of the report: id, question, verdict, one number."""
    rows = [
        (
            f"[{section.finding.id}](#{anchor(section.finding)})",
            section.finding.question,
            section.verdict + (f", {_met(section.outcome)}" if section.verdict == PARTLY else ""),
            section.outcome.headline if section.outcome else "",
        )
        for section in sections
    ]
    return markdown_table(("id", "question", "verdict", "one number"), rows)


def section_lines(section: Section, figures: str) -> list[str]:
    """One section of the report: question, setting, figure, numbers beside the paper's, verdict."""
    finding, outcome = section.finding, section.outcome
    lines = [f"## {finding.id}: {finding.title}", "", f"**{finding.question}** ({finding.source})"]
    for text in _settings_lines(section):
        lines += ["", text]
    if outcome is None:
        return [*lines, "", f"Verdict: **{NOT_RUN}**."]
    lines += ["", f"![{finding.title}]({figures}/{figure_name(finding)})", ""]
    rows = [
        (check.claim, check.paper, check.ours, "yes" if check.held else "**no**")
        for check in outcome.checks
    ]
    lines += markdown_table(("claim and criterion", "paper", "here", "met"), rows)
    if outcome.table:
        lines += ["", *markdown_table(outcome.table[0], outcome.table[1:])]
    for note in outcome.notes:
        lines += ["", note]
    lines += ["", f"Verdict: **{outcome.verdict}** ({_met(outcome)} criteria met)."]
    return lines


def report_text(sections: Iterable[Section], figures: str = "figures") -> str:
    """The whole report in Markdown.

    Args:
        sections: from `read_sections`.
        figures: folder of the figures, relative to the report.
    """
    listed = list(sections)
    scales = {section.results.scale for section in listed if section.results is not None}
    counts = {
        verdict: sum(section.verdict == verdict for section in listed)
        for verdict in (HELD, PARTLY, NOT_HELD, NOT_RUN)
    }
    total = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    lines = [_REPORT_HEAD.format(scale=_LAPTOP if "laptop" in scales else "").rstrip(), ""]
    lines += [f"{len(listed)} questions: {total}.", "", *summary_lines(listed)]
    for section in listed:
        lines += ["", *section_lines(section, figures)]
    return "\n".join(lines) + "\n"


def has_section(name: str) -> bool:
    """Say whether the report has a section on a study."""
    return name in BY_STUDY


def _stored_section(name: str, folder: Path) -> Section:
    finding = BY_STUDY[name]
    results = read_results(name, folder)
    if results is None:
        raise StoreError(
            f"{results_path(name, folder)} does not exist; run: python -m experiments run {name} "
            f"--scale laptop, then: python -m experiments collect {name} --scale laptop"
        )
    return Section(finding, results, finding.evaluate(results))


def verdict_lines(name: str, folder: Path = RESULTS_FOLDER) -> list[str]:
    """What the results of a study show, a line per criterion and the verdict, for a terminal.

    Raises:
        StoreError: the study has no results there.
    """
    section = _stored_section(name, folder)
    assert section.outcome is not None
    lines = [
        f"{'met    ' if check.held else 'NOT met'} {check.claim}: {check.ours}"
        for check in section.outcome.checks
    ]
    return [*lines, f"{section.finding.id}: {section.verdict}; {section.outcome.headline}"]


def draw_stored(name: str, folder: Path = RESULTS_FOLDER, figures: Path = FIGURES) -> Path:
    """Draw the figure of a study from its results.

    Raises:
        StoreError: the study has no results there.
    """
    path = draw_section(_stored_section(name, folder), figures)
    assert path is not None
    return path


def draw_section(section: Section, folder: Path) -> Path | None:
    """Draw a section's figure into a folder; None where the study has not been run."""
    if section.results is None:
        return None
    path = folder / figure_name(section.finding)
    folder.mkdir(parents=True, exist_ok=True)
    section.finding.draw(section.results).savefig(path, dpi=110, metadata={"Software": None})
    return path


def build_report(
    results: Path = RESULTS_FOLDER, report: Path = REPORT, figures: Path = FIGURES
) -> list[Section]:
    """Write the report and its figures from stored results.

    Args:
        results: the folder of the results.
        report: the Markdown file; its figures are linked relative to it.
        figures: the folder of the figures.

    Returns:
        The sections.

    Raises:
        StoreError: a file of results is damaged.
    """
    sections = read_sections(results)
    for section in sections:
        draw_section(section, figures)
    relative = Path(os.path.relpath(figures.resolve(), report.resolve().parent))
    report.parent.mkdir(parents=True, exist_ok=True)
    write_whole(report, report_text(sections, relative.as_posix()).encode())
    return sections
