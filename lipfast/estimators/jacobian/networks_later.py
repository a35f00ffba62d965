"""Jacobian norms of many networks on a device, all queued before anything is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lipfast.estimators.jacobian.function import SampleFunction, differentiating
from lipfast.estimators.jacobian.lanczos_queued import (
    bytes_of_steps,
    queued_norms,
    steps_of,
)
from lipfast.estimators.jacobian.linearization import (
    DerivativeError,
    Footprint,
    footprint,
    prefers_lanczos,
)
from lipfast.estimators.jacobian.networks import (
    chain_norms,
    compute_dtype,
    fused_chain,
    interpreted,
)
from lipfast.estimators.jacobian.rows import bytes_of_rows, row_norms
from lipfast.norms import Norm
from lipfast.ops.fetched import Fetched, sent
from lipfast.plan.architecture import Architecture


@dataclass(frozen=True)
class NormsLater:
    """Norms of the Jacobians of networks, on their way.

    Attributes:
        values: (networks, B).
        checks: truth values that must hold for the norms to be right.
        unfinished: (networks, B): where a longer schedule may find more; None: nowhere.
    """

    values: Tensor
    checks: Sequence[Tensor]
    unfinished: Tensor | None = None
    _again: Callable[[Sequence[int], Tensor], Tensor] | None = None

    def fetched(self) -> FetchedFlags:
        """What must be looked at before the values are used, on its way."""
        return FetchedFlags(self)

    def again(self, networks: Sequence[int], samples: Sequence[Sequence[int]]) -> Tensor:
        """(networks, B): norms of some networks, at some of their samples by the longer schedule.

        They are queued, as all the others.
        """
        assert self._again is not None
        # Where a network has fewer, its first one is looked at several times.
        most = max(map(len, samples))
        padded = [[*own, *[own[0]] * (most - len(own))] for own in samples]
        places = sent(padded, self.values.device)
        known = torch.stack([self.values[network] for network in networks])
        found = self._again(networks, places)
        return known.scatter(1, places, torch.maximum(known.gather(1, places), found))


class FetchedFlags:
    """What is to be known of norms, on its way to the host."""

    def __init__(self, norms: NormsLater) -> None:
        self._checks = len(norms.checks)
        flags = [*norms.checks, *([] if norms.unfinished is None else [norms.unfinished])]
        self._read = Fetched(flags)

    def hold(self) -> bool:
        """Whether the norms are what they were taken to be; waits if nothing has waited since."""
        return all(map(bool, self._read.read()[: self._checks]))

    def unfinished(self) -> dict[int, list[int]]:
        """Samples that a longer schedule may find more at, by network."""
        found: dict[int, list[int]] = {}
        for flags in self._read.read()[self._checks :]:
            for network, sample in flags.nonzero().tolist():
                found.setdefault(network, []).append(sample)
        return found


def plan_norms_later(
    plan: Architecture,
    tensors: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    *,
    norm: Norm,
    dtype: torch.dtype | None = None,
    memory: int,
) -> NormsLater:
    """`plan_jacobian_norms` by the method that fits, without a look at what is found.

    Through torch, as many networks are evaluated at once as fit into the memory.
    """
    dtype = dtype or compute_dtype(tensors, plan.stored_parameters)
    x, checks = x.to(dtype), list[Tensor]()
    chain = fused_chain(plan, norm, x.device)
    if chain is not None:
        return NormsLater(chain_norms(plan, chain, tensors, x, checks), checks)
    with torch.inference_mode(False), differentiating():
        alone = interpreted(plan, tensors[:1], x[None])
        size, constants = footprint(alone), sum(own.nbytes for own in alone.constants)
        many = _ThroughTorch(plan, tensors, size, constants, memory)
        if prefers_lanczos(size, norm, "auto", x.device):
            try:
                values, unfinished = many.by_lanczos(x[None], checks)
                return NormsLater(values, checks, unfinished, partial(many.again, x))
            except DerivativeError:  # no products with Jacobians: rows need none
                checks.clear()
        return NormsLater(many.by_rows(x[None], norm, checks), checks)


_Measured = Callable[[SampleFunction], Sequence[Tensor]]
"""What is asked of networks and samples, (networks x B,) each."""


@dataclass(frozen=True)
class _ThroughTorch:
    """Networks that torch evaluates together.

    Attributes:
        plan: their architecture.
        tensors: theirs.
        size: of one network with one sample.
        constants: bytes of one network's parameters.
        memory: bytes that all may take.
    """

    plan: Architecture
    tensors: Sequence[Mapping[str, Tensor]]
    size: Footprint
    constants: int
    memory: int

    def by_rows(self, x: Tensor, norm: Norm, checks: list[Tensor]) -> Tensor:
        """Norms (networks, B) at samples (1, B, D...), from explicit Jacobians."""
        each = bytes_of_rows(self.size, self.size.outputs)

        def measured(problem: SampleFunction) -> Sequence[Tensor]:
            return [row_norms(problem, self.size, norm, self.memory)]

        return self._together(x, measured, each, checks)[0]

    def by_lanczos(
        self, x: Tensor, checks: list[Tensor], *, again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Norms (networks, B) at samples (networks or 1, B, D...), and which are not finished.

        Raises:
            DerivativeError: the networks have no Jacobian-vector products.
        """
        steps = steps_of(self.size, x.dtype, self.memory, again=again)
        measured = partial(queued_norms, size=self.size, steps=steps, memory=self.memory)
        values, unfinished = self._together(x, measured, bytes_of_steps(self.size, steps), checks)
        return values, unfinished

    def again(self, x: Tensor, networks: Sequence[int], places: Tensor) -> Tensor:
        """Norms of some networks at samples x[places], places (networks, some), in more steps."""
        own = self.tensors
        if len(networks) < len(own):
            own = [own[network] for network in networks]
        with torch.inference_mode(False), differentiating():
            return replace(self, tensors=own).by_lanczos(x[places], [], again=True)[0]

    def _together(
        self, x: Tensor, measured: _Measured, each: int, checks: list[Tensor]
    ) -> list[Tensor]:
        """What is measured, as many networks at a time as fit with `each` bytes for a sample."""
        count = max(1, self.memory // (self.constants + x.shape[1] * each))
        found = []
        for start in range(0, len(self.tensors), count):
            whole = count >= len(self.tensors)
            own = self.tensors if whole else self.tensors[start : start + count]
            samples = x if len(x) == 1 else x[start : start + count]
            problem = interpreted(self.plan, own, samples, checks)
            found.append([values.reshape(len(own), -1) for values in measured(problem)])
        return [torch.cat(column) for column in zip(*found, strict=True)]
