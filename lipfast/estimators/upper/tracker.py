"""Upper bounds along a run: each checkpoint starts from the singular vectors of the one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import overload

from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain
from lipfast.estimators.options import UpperMethod, check_method, upper_step
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import UpperBound
from lipfast.estimators.upper.quadratic.certificate import Multipliers
from lipfast.estimators.upper.spectral_product import upper_bounds_together
from lipfast.estimators.upper.starts import StartVectors
from lipfast.norms import Norm, check_norm
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict


class Tracker:
    """Carries the layers' right singular vectors from one checkpoint of a run to the next.

    From one checkpoint to the next the vectors change little, so that Lanczos takes a few passes
    over each matrix instead of dozens. A start vector decides how soon an estimate is found, never
    whether a bound holds: the certificate is proved anew for every state dict, and for any start,
    also one from another run, the bound is certified just as well. Of a convolution whose kernel
    has changed by much less than `rtol`, the proof is that of the earlier kernel and one of the
    difference. What may differ from a cold start is where in the bracket of relative width `rtol`
    the value lies.

    Made by `Plan.tracker`. Not to be shared between threads.

    Attributes:
        plan: the architecture.
        vectors: name of a layer's weight -> unit vector (columns,), float64, or what a convolution
            starts from; empty at first, and for norms 1 and inf, which are sums and start from
            nothing. May be given to `Plan.upper` as `start`.
        multipliers: what quadratic constraints start from, one tensor per activation; None at
            first, for the method "product", and where that was no larger.

    Example:
        >>> import torch, lipfast
        >>> model = torch.nn.Linear(200, 100, bias=False)
        >>> plan = lipfast.compile(model, torch.zeros(1, 200))
        >>> tracker = plan.tracker()
        >>> first = {"weight": torch.randn(100, 200, generator=torch.Generator().manual_seed(0))}
        >>> cold = tracker.upper(first)
        >>> warm = tracker.upper({"weight": 1.001 * first["weight"]})
        >>> warm.certified, warm.layers[0].passes < cold.layers[0].passes
        (True, True)
        >>> round(warm.value / cold.value, 5)
        1.001
    """

    def __init__(
        self,
        plan: Architecture,
        *,
        norm: Norm = 2,
        rtol: float = 1e-6,
        seed: int = 0,
        domain: Domain | None = None,
        method: UpperMethod = "product",
        effort: int = 2,
        memory: int = 1 << 30,
        progress: bool | None = None,
    ) -> None:
        check_method(method, effort, check_norm(norm), domain)
        self.plan = plan
        self.vectors: StartVectors = {}
        self._warm: Multipliers | None = None
        self._progress, self._step = progress, upper_step(method)
        self._bounds = partial(
            upper_bounds_together,
            plan,
            norm=check_norm(norm),
            rtol=rtol,
            seed=seed,
            domain=domain,
            method=method,
            effort=effort,
            memory=memory,
        )

    @overload
    def upper(self, state_dicts: StateDict) -> UpperBound: ...
    @overload
    def upper(self, state_dicts: Sequence[StateDict]) -> list[UpperBound]: ...
    def upper(self, state_dicts: StateDict | Sequence[StateDict]) -> UpperBound | list[UpperBound]:
        """Certified upper bounds of the run's next checkpoint, or of the next few in one call.

        Args:
            state_dicts: one state dict, or consecutive ones in a list: one native call, in which
                all start from the last checkpoint before the list.

        Returns:
            One `UpperBound`, or a list in the order of the state dicts.

        Raises:
            ArgumentError: the list is empty.
            StateDictError, NonFiniteError: a state dict does not fit the architecture; the vectors
                are as before.
        """
        single = isinstance(state_dicts, Mapping)
        with shown_progress(self._step, None, self._progress):
            count = len(state_dicts) if isinstance(state_dicts, Sequence) else 1
            found = self._bounds(
                state_dicts, start=self.vectors, warm=[self._warm] * count, follow=count == 1
            )
        if not len(found):
            raise ArgumentError("no state dicts were given")
        # Copies: the op's vectors are pieces of one tensor for the whole call.
        self.vectors = {
            name: vector.clone() if isinstance(vector, Tensor) else vector
            for name, vector in found.starts[-1].items()
        }
        self._warm = found.warm_start(len(found) - 1)
        results = [found.of(network) for network in range(len(found))]
        return results[0] if single else results

    @property
    def multipliers(self) -> Multipliers | None:
        """What quadratic constraints start from."""
        return self._warm

    def reset(self) -> None:
        """Forget the vectors and multipliers: the next checkpoint starts without."""
        self.vectors, self._warm = {}, None
