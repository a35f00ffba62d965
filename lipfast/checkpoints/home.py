"""Paths that begin with `~`."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Replace `~` and `~user` by the home folder; where there is no such user, nothing.

    `Path.expanduser` raises a RuntimeError there, and a manifest is untrusted input.

    Example:
        >>> expanded("~nobody-of-this-name/a.pt").as_posix()
        '~nobody-of-this-name/a.pt'
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111
