"""The columns of the store, and those of earlier versions."""

from __future__ import annotations

from typing import Any, TypeAlias

import pyarrow as pa

FORMAT = "lipfast scores"
VERSION = 5

READING = 2
"""Changes when a file may be read, or fitted to an architecture, in another way than before."""

UNREADABLE = "cannot be read"
"""The kind of failure that depends on the file's content alone."""

Row: TypeAlias = "dict[str, Any]"

LAYER = pa.struct(
    [
        pa.field("index", pa.int32()),
        pa.field("name", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("shape", pa.list_(pa.int64())),
        pa.field("lower", pa.float64()),
        pa.field("upper", pa.float64()),
        pa.field("certified", pa.bool_()),
        pa.field("passes", pa.int32()),
    ]
)
"""One layer of a checkpoint: a bracket of its operator norm."""

SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("mtime", pa.float64(), nullable=False),
        pa.field("run", pa.string()),
        pa.field("step", pa.int64()),
        pa.field("epoch", pa.float64()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("note", pa.string()),
        pa.field("upper", pa.float64()),
        pa.field("log_upper", pa.float64()),
        pa.field("upper_certified", pa.bool_()),
        pa.field("lower", pa.float64()),
        pa.field("lower_certified", pa.bool_()),
        pa.field("lower_sample", pa.int64()),
        pa.field("jacobian_max", pa.float64()),
        pa.field("mean", pa.float64()),
        pa.field("rms", pa.float64()),
        pa.field("samples", pa.int64()),
        pa.field("norm", pa.float64(), nullable=False),
        pa.field("seconds_read", pa.float64()),
        pa.field("seconds_upper", pa.float64()),
        pa.field("seconds_lower", pa.float64()),
        pa.field("scored_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("arch", pa.string()),
        pa.field("data", pa.string()),
        pa.field("lipfast_version", pa.string(), nullable=False),
        pa.field("torch_version", pa.string(), nullable=False),
        pa.field("capability", pa.string(), nullable=False),
        pa.field("metadata", pa.string()),
        pa.field("layers", pa.list_(LAYER)),
        pa.field("given", pa.string()),
        pa.field("reading", pa.int32()),
        pa.field("upper_method", pa.string()),
    ],
)
"""One row per checkpoint.

`norm` is 1, 2 or inf; times are seconds; `metadata` is a JSON object; `given` names the ops whose
rules a user wrote (null: none), which a certified bound is proved given; `note` says how a file's
weights were fitted to the architecture (null: as they are); `reading` is `READING` as it was then;
`upper_method` is how the upper bound was got.
"""

ADDED = {2: ("kind",), 3: ("given", "note"), 4: ("reading",), 5: ("upper_method",)}
"""Version -> the columns that it added. A version only ever adds columns that may be null."""


def is_outdated(uri: str, note: str | None, reading: int | None) -> bool:
    """Whether a file may be read in another way now than when its row was written.

    What lies in a file of safetensors and needs no note is read as ever.

    Example:
        >>> is_outdated("a.safetensors", None, None), is_outdated("a.pt", None, None)
        (False, True)
    """
    return reading != READING and (note is not None or not uri.lower().endswith(".safetensors"))


def schema_of(version: int) -> pa.Schema:
    """Return the schema of this or an earlier version.

    Example:
        >>> set(schema_of(2).names) - set(schema_of(1).names)
        {'kind'}
    """
    later = {name for added, names in ADDED.items() if added > version for name in names}
    return pa.schema([field for field in SCHEMA if field.name not in later])


def upgraded(table: pa.Table) -> pa.Table | None:
    """Give a table of any known version the newest columns; None if it has other ones."""
    known = {version: schema_of(version) for version in range(VERSION, 0, -1)}
    if not any(table.schema.equals(schema) for schema in known.values()):
        return None
    missing = [field for field in SCHEMA if field.name not in table.column_names]
    for field in missing:
        table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    return table.select(SCHEMA.names)
