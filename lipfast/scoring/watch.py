"""Follow an archive while training writes to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from lipfast.checkpoints import CheckpointFile

_QUIET = 10.0  # seconds; a file that has not changed for so long is finished


def looks(
    find: Callable[[], Sequence[CheckpointFile]],
    interval: float,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[list[CheckpointFile]]:
    """Look again and again; yield, each time, the files that are finished.

    A file is finished once two looks found the same size and time, or if it is old already.

    Args:
        find: lists the archive.
        interval: seconds between looks.
        sleep: waits.
    """
    before: dict[str, tuple[int, float]] = {}
    while True:
        files = find()
        settled = time.time() - max(_QUIET, interval)
        yield [
            file
            for file in files
            if before.get(file.uri) == (file.size, file.mtime) or 0 < file.mtime < settled
        ]
        before = {file.uri: (file.size, file.mtime) for file in files}
        sleep(interval)
