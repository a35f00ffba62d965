"""What a score depends on beside the weights and the plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lipfast.norms import Norm

METHOD = 1
"""Changes when the same checkpoint, plan and options would give other scores than before."""


@dataclass(frozen=True)
class Options:
    """What changes the scores, and how many checkpoints share a call.

    Attributes:
        norm: 1, 2 or inf.
        seed: seed of the start vectors.
        batch_size: checkpoints of one plan per call.
        memory: bytes of intermediate results to hold at most.
        prefix: of the names that belong to the architecture; None finds it out.
    """

    norm: Norm = 2
    seed: int = 0
    batch_size: int = 64
    memory: int = 1 << 30
    prefix: str | None = None

    def fingerprint(self, plan: str, samples: str) -> str:
        """Hash what a score depends on beside the weights.

        Args:
            plan: its fingerprint.
            samples: their digest.
        """
        parts: tuple[object, ...] = (METHOD, plan, float(self.norm), self.seed, samples)
        parts += () if self.prefix is None else (self.prefix,)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
