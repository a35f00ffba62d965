"""Rows of a store, made up."""

from __future__ import annotations

import math
from datetime import datetime, timedelta, timezone

from lipfast.scoring.store import StoreWriter

START = datetime(2024, 1, 1, tzinfo=timezone.utc)


def layer(index: int) -> dict:
    return {
        "index": index,
        "name": f"{index}",
        "kind": "linear",
        "shape": [3, 2],
        "lower": 1.0,
        "upper": 1.5,
        "certified": True,
        "passes": 4,
    }


def row(uri: str = "file:///a.pt", *, at: int = 0, **values) -> dict:
    return {
        "uri": uri,
        "size": 10,
        "mtime": 1.5,
        "run": "r",
        "step": 1,
        "epoch": None,
        "status": "ok",
        "upper": 2.0,
        "log_upper": math.log(2),
        "upper_certified": True,
        "lower": 1.0,
        "lower_certified": True,
        "lower_sample": 3,
        "jacobian_max": 1.25,
        "mean": 0.5,
        "rms": 0.75,
        "samples": 7,
        "norm": 2.0,
        "seconds_read": 0.1,
        "seconds_upper": 0.2,
        "seconds_lower": 0.3,
        "scored_at": START + timedelta(seconds=at),
        "fingerprint": "f",
        "seed": 0,
        "lipfast_version": "0",
        "torch_version": "2",
        "capability": "scalar",
        "metadata": '{"width":4}',
        "layers": [layer(0), layer(2)],
        **values,
    }


def error_row(uri: str = "file:///a.pt", **values) -> dict:
    empty = dict.fromkeys(("upper", "lower", "layers", "metadata"))
    return row(uri, **{**empty, "status": "error", "error": "broken", **values})


def write(path, *parts) -> None:
    with StoreWriter(path) as writer:
        for rows in parts:
            writer.append(rows)
            writer.flush()
