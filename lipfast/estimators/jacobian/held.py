"""Evaluations of a module whose forward writes: each begins with the state as it was found."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from lipfast.errors import ArgumentError, LipfastError
from lipfast.plan.kept import Kept
from lipfast.plan.kept_values import alike, snapshot

State = dict[str, Tensor]


class HeldState:
    """Parameters and buffers as a module is given them, evaluation by evaluation.

    Modules that write nothing share one set of tensors. Of the others each evaluation gets copies,
    which its graph may keep, and finds everything else as it was.

    Args:
        kept: what the module holds.
        make: the tensors by name, or the one of a name; fresh copies of them if asked for.
        parameters: names of those that are no buffers.
    """

    def __init__(
        self, kept: Kept, make: Callable[[bool, str | None], State], parameters: Collection[str]
    ) -> None:
        self._kept, self._make, self._parameters = kept, make, parameters
        self._shared = make(False, None)
        self._writes = False

    def __call__(self) -> State:
        """For the next evaluation."""
        if not self._writes:
            return self._shared
        self._kept.restore()
        return self._make(True, None)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """Tensors that evaluations share."""
        return tuple(self._shared.values())

    def settle(self, evaluate: Callable[[Tensor, State], Tensor], x: Tensor) -> None:
        """See after a first evaluation whether it wrote, and whether the outputs depend on that.

        Args:
            evaluate: the module on samples, with such tensors.
            x: some samples.

        Raises:
            ArgumentError: what is written depends on the samples, and the outputs on what is
                written: the module is not one function of a sample; names the state.
        """
        if not self._written(self._shared):
            return
        self._writes = True
        # Different samples: what is written from equal ones may be no number at all.
        first = torch.cat([x[:2], 2 * x[:1] + 1])
        second = torch.cat([3 * x[:2] - 1, x[:1] / 2])
        try:
            with torch.enable_grad():
                plain, written = self._evaluated(evaluate, first, self())
                self._kept.restore()
                direct = self._evaluated(evaluate, first, self._make(False, None))[0]
                state = self()
                other = self._evaluated(evaluate, second, state)[1]
        except LipfastError:
            raise
        except Exception as error:  # user code runs here: anything may come out
            raise ArgumentError(
                "the model writes to what it holds, and cannot be evaluated again from where it "
                f"was: {type(error).__name__}: {error}"
            ) from error
        try:
            with torch.enable_grad():
                after = self._evaluated(evaluate, first, state)[0]
        except Exception:  # user code, which does not expect what it wrote itself
            after = None
        self._kept.restore()
        self._shared = self._make(False, None)
        from_samples = [
            name for name, value in written.items() if not alike(value, other.get(name))
        ]
        if not alike(plain, direct):
            raise ArgumentError(
                f"forward writes its {', '.join(written)}, and not only as attributes of the "
                "modules that own them: so its outputs cannot be followed. Write in training mode "
                "only (if self.training)"
            )
        if from_samples and not alike(plain, after):
            raise ArgumentError(
                f"forward writes its {', '.join(from_samples)} from the samples that it sees, and "
                "its outputs depend on that: so they depend on the samples before, too. Evaluate "
                "the model once, if this initialises it, or keep such state out of eval mode"
            )

    def _evaluated(
        self, evaluate: Callable[[Tensor, State], Tensor], x: Tensor, state: State
    ) -> tuple[Tensor, dict[str, Any]]:
        result = evaluate(x, state).detach().clone()
        return result, self._written(state)

    def _written(self, state: State) -> dict[str, Any]:
        """What an evaluation with these tensors wrote to, and what is there now."""
        written = self._kept.written()
        for name, value in state.items():
            # One at a time: in another precision each is a copy.
            if not alike(value, self._make(False, name)[name]):
                kind = "parameter" if name in self._parameters else "buffer"
                written[f"{kind} '{name}'"] = snapshot(value)
        return written
