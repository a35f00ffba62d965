"""Writing files so that a reader, or a run that is killed, never leaves half of one behind."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file to a temporary name beside it and rename it: it is there whole or not at all.

    The temporary name is `.<name>.<process>.tmp`; a killed process may leave it.

    Args:
        path: of the file; its folder exists. An older file is replaced.
        content: of the file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
