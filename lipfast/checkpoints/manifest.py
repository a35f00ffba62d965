"""Manifests: a table of checkpoints with their metadata, as CSV or as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from lipfast.checkpoints.home import expanded
from lipfast.checkpoints.metadata import Scalar
from lipfast.errors import ArchiveError
from lipfast.text import alternatives, to_utf8

COLUMNS = ("uri", "path", "file", "checkpoint")
"""The column that names the checkpoint: the first of these that is there."""


@dataclass(frozen=True)
class Entry:
    """One line of a manifest.

    Attributes:
        path: path or URL of the checkpoint; relative paths are those from the manifest's folder.
        metadata: the other columns, without the empty ones.
    """

    path: str
    metadata: dict[str, Scalar]


def read_manifest(path: str) -> Iterator[Entry]:
    r"""Read a manifest.

    A CSV file has a header; a JSON lines file has one object per line. One of `COLUMNS` names the
    checkpoint, everything else is its metadata and goes before what the checkpoint itself says.

    Args:
        path: of the manifest, or its fsspec URL.

    Raises:
        ArchiveError: it cannot be read, or a line names no checkpoint; says which.

    Example:
        >>> import pathlib, tempfile
        >>> table = pathlib.Path(tempfile.mkdtemp()) / "runs.csv"
        >>> _ = table.write_text("path,run,width\na.pt,first,64\n")
        >>> [(pathlib.Path(entry.path).name, entry.metadata) for entry in read_manifest(str(table))]
        [('a.pt', {'run': 'first', 'width': '64'})]
    """
    text = _content(path)
    lines = _csv(text, path) if path.lower().endswith(".csv") else _json_lines(text, path)
    folder = path.rpartition("/")[0] if "://" in path else str(Path(path).absolute().parent)
    for number, values in lines:
        column = next((name for name in COLUMNS if values.get(name)), None)
        if column is None:
            raise ArchiveError(
                f"manifest '{path}', line {number}: names no checkpoint; expected a column "
                f"{alternatives(COLUMNS)}"
            )
        name = str(values[column])
        if "\0" in name:
            raise ArchiveError(f"manifest '{path}', line {number}: a zero byte in a path")
        if to_utf8(name) != name:
            raise ArchiveError(f"manifest '{path}', line {number}: a lone surrogate in a path")
        yield Entry(_absolute(name, folder), _other_columns(values, column))


def _content(path: str) -> str:
    try:
        if "://" not in path:
            content = expanded(path).read_bytes()
        else:
            filesystem, inner = fsspec.url_to_fs(path)
            content = filesystem.cat_file(inner)
        return content.decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ArchiveError(f"no such manifest: '{path}'") from error
    except UnicodeDecodeError as error:
        raise ArchiveError(f"manifest '{path}': not UTF-8 text: {error}") from error
    except Exception as error:  # each file system has errors of its own
        raise ArchiveError(f"cannot read the manifest '{path}': {error}") from error


def _csv(text: str, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise ArchiveError(
                    f"manifest '{path}', line {reader.line_num}: more values than columns "
                    f"({', '.join(reader.fieldnames or ())})"
                )
            yield reader.line_num, {str(key).strip(): value for key, value in row.items()}
    except csv.Error as error:
        raise ArchiveError(f"manifest '{path}', line {reader.line_num}: {error}") from error


def _json_lines(text: str, path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ArchiveError(f"manifest '{path}', line {number}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ArchiveError(f"manifest '{path}', line {number}: expected a JSON object")
        yield number, values


def _other_columns(values: Mapping[str, Any], column: str) -> dict[str, Scalar]:
    return {
        key: value
        for key, value in values.items()
        if key and key != column and isinstance(value, (bool, int, float, str)) and value != ""
    }


def _absolute(path: str, folder: str) -> str:
    if "://" in path or path.startswith(("/", "~")):
        return path
    return f"{folder}/{path}"
