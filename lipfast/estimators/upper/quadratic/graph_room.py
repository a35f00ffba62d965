"""What a bound by dense matrices takes of memory and time, told before it is taken.

No part of a proof: what does not fit is not bounded this way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


class QuadraticBoundError(Exception):
    """A network that nothing can be said of; the message is the reason."""


SEARCHED_IN_SINGLE = 512
"""From so many entries on that are alive at once, or read by one activation, float32 searches."""
# Matrices of one size that live together in an inequality's proof, and in a step of a sweep.
_IN_PROOF = 9
_IN_SWEEP = 3
# Sweeps that a search takes beside its evaluations, and as many as all proofs take.
_SWEEPS_OF_STARTS = 3
_SWEEPS_OF_PROOFS = 6


@dataclass(frozen=True)
class StepSizes:
    """How many numbers a step reads and gives, and which of its products are made.

    Attributes:
        before: entries of what is alive before.
        read: of what the activation reads.
        given: of the activation.
        behind: of what is alive behind.
        moved: whether C is no identity.
        kept: whether something but the activation is carried on.
        added: whether B is no identity.
    """

    before: int
    read: int
    given: int
    behind: int
    moved: bool = False
    kept: bool = False
    added: bool = False

    @property
    def factored(self) -> float:
        """Multiplications and additions of D - K = L L^T, and of what is solved with L."""
        n, behind = float(self.read), float(self.behind)
        own = n**3 / 3 + n**2 * behind + 2 * n * behind**2
        return own + 2 * behind**2 * self.given * self.added

    @property
    def multiplied(self) -> float:
        """Those of the products of C and A with Y."""
        rows = float(self.read * self.moved + self.behind * self.kept)
        return 2 * rows * self.before * (rows + self.before)


class Room:
    """Counts what the matrices of one network take.

    Args:
        memory: bytes for all that lives at once.
        operations: multiplications and additions, of the search and of the proof.
        evaluations: sweeps of the search, after its starts.
    """

    def __init__(self, memory: int, operations: float = math.inf, evaluations: int = 30) -> None:
        self._memory, self._operations = memory, operations
        self._sweeps = evaluations + _SWEEPS_OF_STARTS + _SWEEPS_OF_PROOFS
        self._held = 0
        self._steps: list[StepSizes] = []

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """What lives from now on, in the place of what did before."""
        storages = {own.untyped_storage().data_ptr(): own.untyped_storage() for own in tensors}
        self._held = sum(storage.nbytes() for storage in storages.values())

    def require(self, what: str, needed: float) -> None:
        """Room for what is to live beside the matrices that are held.

        Raises:
            QuadraticBoundError: there is not enough.
        """
        if self._held + needed > self._memory:
            raise QuadraticBoundError(
                f"{what} would take {(self._held + needed) / 2**20:.0f} MiB, "
                f"memory={self._memory} is {self._memory / 2**20:.0f} MiB"
            )

    def require_step(self, what: str, sizes: StepSizes, *, last: bool = False) -> None:
        """Room and time for one more step, in the search and in its proof.

        Args:
            what: its name.
            sizes: its sizes.
            last: only ask; the step is to come.

        Raises:
            QuadraticBoundError: there is not enough.
        """
        steps = [*self._steps, sizes]
        self.require(f"the quadratic constraints of {what}", peak_of_steps(steps))
        # What the first step multiplies is the same in every sweep.
        once = steps[0].multiplied
        total = once + self._sweeps * sum(own.factored + own.multiplied for own in steps)
        total -= self._sweeps * once
        if total > self._operations:
            raise QuadraticBoundError(
                f"quadratic constraints up to {what} would take {total:.1e} operations, "
                f"more than the {self._operations:.0e} that this effort allows"
            )
        if not last:
            self._steps = steps


def peak_of_steps(steps: list[StepSizes]) -> float:
    """Bytes of all sweeps and proofs beside the steps' matrices."""
    single = any(max(step.before, step.read) >= SEARCHED_IN_SINGLE for step in steps)
    width = 4 if single else 8
    # Of the best sweep and of the last one all factors are kept.
    kept = sum(2 * width * (step.read**2 + step.read * step.behind) for step in steps)
    sweep = max(_live_beside(step, _IN_SWEEP) for step in steps)
    proof = max(_live_beside(step, _IN_PROOF) for step in steps)
    return max(kept + width * sweep, 8.0 * proof)


def _live_beside(step: StepSizes, matrices: int) -> float:
    n, before, behind = float(step.read), float(step.before), float(step.behind)
    own = matrices * (n**2 / 2 + n * behind + behind**2 / 2)
    return own + 2 * before**2 + (n + behind) * before
