"""Which checkpoints of an archive are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lipfast.checkpoints import CheckpointFile, Pattern
from lipfast.errors import ArgumentError
from lipfast.scoring.order import every
from lipfast.scoring.where import Where


@dataclass(frozen=True)
class Selection:
    """What the user says about which checkpoints to take.

    Attributes:
        pattern: metadata from paths.
        where: conditions on the metadata.
        step: of each run, the first checkpoint and every `step`-th after it.
    """

    pattern: Pattern | None
    where: Where
    step: int

    @staticmethod
    def parse(pattern: str | None, where: str | Sequence[str], step: int) -> Selection:
        """Check and parse.

        Raises:
            ArgumentError: one of them is malformed.
        """
        if not isinstance(step, int) or step < 1:
            raise ArgumentError(f"every {step!r}: expected an integer, at least 1")
        return Selection(None if pattern is None else Pattern(pattern), Where.parse(where), step)

    def described(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Add what the pattern tells to each file; what a manifest says goes before it.

        Raises:
            ArgumentError: the pattern describes none of the paths; shows one.
        """
        if self.pattern is None or not files:
            return list(files)
        found = [self.pattern.match(file.path) for file in files]
        if not any(found):
            raise ArgumentError(
                f"the pattern '{self.pattern.text}' describes none of {len(files)} paths, for "
                f"instance not '{files[0].uri}'"
            )
        return [
            replace(file, extra={**(fields or {}), **file.extra})
            for file, fields in zip(files, found, strict=True)
        ]

    def chosen(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Leave out what is known, without reading it, to be left out."""
        return [
            file for file in every(files, self.step) if self.where.known(file.extra) is not False
        ]

    def needs_reading(self, files: Sequence[CheckpointFile]) -> bool:
        """Whether the conditions depend on metadata that only the files know."""
        return any(self.where.known(file.extra) is None for file in files)
