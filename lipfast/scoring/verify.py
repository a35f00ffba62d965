"""Check a store of scores, part by part."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lipfast.errors import StoreError
from lipfast.scoring.scores import read_part
from lipfast.scoring.store import check_version, parts, store_folder


@dataclass(frozen=True)
class Verification:
    """What `verify_store` found.

    Attributes:
        parts: number of parts.
        rows: rows in the parts that can be read.
        problems: one sentence per problem; empty when the store is sound.
    """

    parts: int
    rows: int
    problems: tuple[str, ...]


def verify_store(path: str | os.PathLike[str]) -> Verification:
    """Read every part of a store, completely, and check it.

    Checked are that each part can be read, has the columns of the schema, and that its rows keep
    the schema's promises: a known status, a reason for each error, `lower <= upper` where both
    are certified.

    Raises:
        StoreError: there is no store of a known version at `path`.
    """
    folder = store_folder(path)
    check_version(folder)
    rows, problems = 0, []
    found = parts(folder)
    for part in found:
        try:
            table = read_part(part)
        except StoreError as error:
            problems.append(str(error))
            continue
        rows += table.num_rows
        problems.extend(f"the part '{part}': {problem}" for problem in _row_problems(table))
    return Verification(len(found), rows, tuple(problems))


def _row_problems(table: pa.Table) -> Iterator[str]:
    names = ("uri", "status", "error", "lower", "upper", "lower_certified", "upper_certified")
    columns: Mapping[str, list[Any]] = {name: table.column(name).to_pylist() for name in names}
    for uri, status, error, lower, upper, low_ok, up_ok in zip(*columns.values(), strict=True):
        if status not in ("ok", "error"):
            yield f"{uri}: unknown status {status!r}"
        elif status == "error" and not error:
            yield f"{uri}: an error without a reason"
        elif status == "ok" and (lower is None or upper is None):
            yield f"{uri}: a bound is missing"
        elif status == "ok" and low_ok and up_ok and not lower <= upper:
            yield f"{uri}: its lower bound {lower} exceeds its upper bound {upper}"
