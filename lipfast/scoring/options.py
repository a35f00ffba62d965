"""What a score depends on beside the weights and the plan."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from lipfast.estimators.jacobian.linearization import is_small
from lipfast.estimators.options import UpperMethod
from lipfast.norms import Norm
from lipfast.plan.architecture import Architecture

METHOD = 2
"""Changes when the same checkpoint, plan and options would give other scores than before."""
METHOD_OF_SUMS = 3
"""The same for norms 1 and inf: since version 3 upper bounds know signs."""


def method_of(plan: Architecture) -> int:
    """The method whose scores a plan has: an earlier one where nothing has changed for it since.

    Stores go on with what was scored by it. Since version 1, convolutions have other lower values,
    Lanczos on Jacobians other ends, and what is not a chain may have other bounds.
    """
    chain = plan.chain is not None and is_small(*plan.jacobian_shape)
    return 1 if chain and all(layer.convolution is None for layer in plan.layers) else METHOD


@dataclass(frozen=True)
class Options:
    """What changes the scores, and how many checkpoints share a call.

    Attributes:
        norm: 1, 2 or inf.
        seed: seed of the start vectors.
        batch_size: checkpoints of one plan per call; None for what suits the device.
        memory: bytes of intermediate results to hold at most.
        prefix: of the names that belong to the architecture; None finds it out.
        upper: method of upper bounds.
    """

    norm: Norm = 2
    seed: int = 0
    batch_size: int | None = None
    memory: int = 1 << 30
    prefix: str | None = None
    upper: UpperMethod = "product"

    def fingerprint(self, plan: str, samples: str, method: int = METHOD) -> str:
        """Hash what a score depends on beside the weights.

        Args:
            plan: its fingerprint.
            samples: their digest.
            method: of the plan in norm 2, see `method_of`.
        """
        method = method if self.norm == 2 else METHOD_OF_SUMS
        parts: tuple[object, ...] = (method, plan, float(self.norm), self.seed, samples)
        parts += () if self.prefix is None else (self.prefix,)
        parts += () if self.upper == "product" else (f"upper={self.upper}",)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
