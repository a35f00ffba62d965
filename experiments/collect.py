"""The collecting step: from the runs of a study to its small file of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.errors import ConfigError
from experiments.findings import BY_STUDY, Finding
from experiments.findings.sources import Sources
from experiments.results import write_results
from experiments.study import Study
from lipfast.errors import StoreError


def finding_of(name: str) -> Finding:
    """Return the finding of a study.

    Raises:
        ConfigError: the report has no section on it.
    """
    if name not in BY_STUDY:
        raise ConfigError(
            f"'{name}' has no section in the report; those with one are {', '.join(BY_STUDY)}"
        )
    return BY_STUDY[name]


def _settings(study: Study, sources: Sources) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in (study.name, *study.uses):
        try:
            sweeps = sources.sweeps(name)
        except StoreError:  # a study without sweeps of its own, or one whose part is not needed
            continue
        found.update({sweep.label: sweep.settings for sweep in sweeps.values()})
    return found


def collect(study: Study, out: Path, folder: Path | None = None) -> Path:
    """Evaluate the checkpoints and scores of a study and write its results.

    Args:
        study: from `load_study`.
        out: the folder of all sweeps.
        folder: of the results, by default `<out>/results-<scale>`. The committed ones, from which
            the report is built, are in `experiments/results`.

    Returns:
        The path written.

    Raises:
        ConfigError: the report has no section on the study.
        StoreError: a sweep that it needs has not been run and scored.
    """
    finding = finding_of(study.name)
    sources = Sources(study.name, study.scale, out)
    return write_results(
        study.name,
        finding.collect(sources),
        scale=study.scale,
        settings=_settings(study, sources),
        folder=folder if folder is not None else out / f"results-{study.scale}",
    )
