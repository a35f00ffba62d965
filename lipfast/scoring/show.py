"""Stores and bounds as plain text and as JSON values."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from lipfast.checkpoints import Checkpoint
from lipfast.estimators.estimate import Estimate
from lipfast.estimators.floor.result import WHAT_IT_SAYS
from lipfast.estimators.results import Bounds, UpperBound
from lipfast.estimators.upper.table import layer_records, shares_of
from lipfast.scoring.scores import read_scores
from lipfast.text import counted, given_rules, printable

MAX_RUNS = 40
_MAX_REASONS = 5


def store_overview(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a store: counts, reasons of failures, and the newest checkpoint of each run.

    Raises:
        StoreError: the store cannot be read.
    """
    names = ["run", "step", "status", "error", "uri", "upper", "lower", "mean", "norm", "given"]
    names += ["note", "fingerprint", "lipfast_version"]
    rows = read_scores(path).select(names).to_pylist()
    failed = [row for row in rows if row["status"] == "error"]
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:  # sorted by run and step: the last one stays
        if row["status"] == "ok":
            key = (row["run"], row["fingerprint"]) if row["run"] else (row["uri"], "")
            row["checkpoints"] = latest.get(key, {}).get("checkpoints", 0) + 1
            latest[key] = row
    shown = ("run", "checkpoints", "step", "lower", "mean", "upper", "norm")
    return {
        "checkpoints": len(rows),
        "scored": len(rows) - len(failed),
        "failed": len(failed),
        "versions": sorted({row["lipfast_version"] for row in rows}),
        "given": dict(Counter(row["given"] for row in rows if row["given"])),
        "noted": sum(bool(row["note"]) for row in rows if row["status"] == "ok"),
        "notes": dict(
            Counter(
                row["note"] for row in rows if row["note"] and row["status"] == "ok"
            ).most_common(_MAX_REASONS)
        ),
        "errors": [
            {"reason": reason, "count": count, "uri": _first_uri(failed, reason)}
            for reason, count in Counter(_reason(row) for row in failed).most_common(_MAX_REASONS)
        ],
        "runs": [{name: row[name] for name in shown} for row in latest.values()],
    }


def overview_text(overview: dict[str, Any]) -> str:
    """Lay out what `store_overview` returns, at most `MAX_RUNS` runs of it."""
    lines = [
        f"{counted(overview['checkpoints'], 'checkpoint')}: {overview['scored']} scored, "
        f"{overview['failed']} failed; written by lipfast {', '.join(overview['versions']) or '-'}"
    ]
    lines += [
        f"  {count} bounded {given_rules(ops.split(', '))}"
        for ops, count in overview["given"].items()
    ]
    notes = overview["notes"]
    lines += [f"  {count} scored with a note: {printable(note)}" for note, count in notes.items()]
    if overview["noted"] > sum(notes.values()):
        lines.append(f"  {overview['noted']} have a note in all: the store's column 'note'")
    lines += [
        f"  {error['count']} failed: {printable(error['reason'])} ({error['uri']})"
        for error in overview["errors"]
    ]
    unlisted = overview["failed"] - sum(error["count"] for error in overview["errors"])
    if unlisted:
        lines.append(f"  {unlisted} failed for other reasons: --failed lists them all")
    runs = overview["runs"]
    if runs:
        names = list(runs[0])
        lines += ["", *table(names, [[row[name] for name in names] for row in runs[:MAX_RUNS]])]
    if len(runs) > MAX_RUNS:
        lines.append(f"... and {len(runs) - MAX_RUNS} more (lipfast.read_scores reads them all)")
    return "\n".join(lines)


def store_failures(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Every failed checkpoint: its `uri`, the `kind` of failure, the `reason`.

    Raises:
        StoreError: the store cannot be read.
    """
    rows = read_scores(path).select(["uri", "status", "kind", "error"]).to_pylist()
    return [
        {"uri": row["uri"], "kind": row["kind"] or "", "reason": _reason(row)}
        for row in rows
        if row["status"] == "error"
    ]


def failures_text(failures: Sequence[dict[str, str]]) -> str:
    """Lay out what `store_failures` returns, under a heading for each kind."""
    if not failures:
        return "nothing failed"
    lines = []
    for kind, count in Counter(failure["kind"] for failure in failures).most_common():
        lines.append(f"{count} failed: {printable(kind)}")
        lines += [
            f"  {failure['uri']}: {printable(failure['reason'])}"
            for failure in failures
            if failure["kind"] == kind
        ]
    return "\n".join(lines)


def bounds_json(checkpoint: Checkpoint, found: Bounds | UpperBound) -> dict[str, Any]:
    """Turn the bounds of one checkpoint into JSON values."""
    upper = found.upper if isinstance(found, Bounds) else found
    sources = upper.sources
    _, other, branches = shares_of(upper.layers, sources)
    result: dict[str, Any] = {
        "uri": checkpoint.file.uri,
        "note": checkpoint.note,
        "metadata": checkpoint.metadata.values,
        "upper": _estimate_json(upper),
        "layers": layer_records(upper.layers, sources),
        "log_share": {"other_ops": other, "branches": branches},
    }
    if isinstance(found, Bounds):
        lower = found.lower
        result["lower"] = {**_estimate_json(lower), "sample": lower.sample}
        result["jacobian_max"] = lower.jacobian.value
        result |= {"mean": lower.mean, "rms": lower.rms, "samples": lower.samples}
        result["ratio"] = found.ratio
    if upper.floor is not None:
        names = ("value", "log_value", "norm", "certified", "reason")
        result["floor"] = {name: getattr(upper.floor, name) for name in names}
        result["floor"] |= {"given": list(upper.floor.given), "says": WHAT_IT_SAYS}
    return result


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    r"""Lay out rows below their names, numbers to the right.

    Example:
        >>> print("\n".join(table(["run", "upper"], [["a", 12.5], ["bc", None]])))
        run  upper
        a     12.5
        bc       -
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    numeric = [not any(isinstance(row[i], str) for row in rows) for i in range(len(names))]
    return [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in [list(names), *cells]
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else printable(str(value))


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    names = ("value", "log_value", "norm", "method", "certified", "reason")
    return {name: getattr(estimate, name) for name in names} | {"given": list(estimate.given)}


def _reason(row: dict[str, Any]) -> str:
    return str(row["error"]).removeprefix(f"{row['uri']}: ")


def _first_uri(rows: Sequence[dict[str, Any]], reason: str) -> str:
    return next(str(row["uri"]) for row in rows if _reason(row) == reason)
