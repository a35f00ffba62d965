"""Lower bounds of many networks of one plan, from samples that are read once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import missing_error_rules
from lipfast.estimators.jacobian.function import joined_inputs
from lipfast.estimators.jacobian.networks import compute_dtype
from lipfast.estimators.jacobian.networks_later import plan_norms_later
from lipfast.estimators.lower.sample_maximum import Sample, assembled, finite_norms
from lipfast.estimators.lower.secants import Secants, certified_secants
from lipfast.estimators.lower.secants_in_norm import secants_in_norm
from lipfast.estimators.options import check_flags
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import LowerBound
from lipfast.estimators.samples import SampleStream, check_inputs
from lipfast.norms import AnyNorm, Norm, check_norm
from lipfast.ops.denormals import denormals_flushed
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve_later


def lower_bounds(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    samples: SampleStream,
    *,
    norm: AnyNorm,
    per_sample: bool,
    memory: int,
    domain: Domain | None,
    progress: bool | None,
) -> list[LowerBound]:
    """Lower bounds on the Lipschitz constants of many networks, from samples that are read once.

    ``jacobian = max_b ||J(x_b)||`` (Khromov and Singh, 2024) is a lower bound wherever the network
    is differentiable, up to rounding; the bound's `value` is the certified difference quotient
    ``||f(a) - f(b)|| / ||a - b||`` near the arg-max sample (see `estimators.lower.secants`).

    Args:
        plan: the architecture.
        state_dicts: one or many.
        samples: of the shapes of the plan's inputs.
        norm: 1, 2 or inf.
        per_sample: keep the Jacobian norm of every sample.
        memory: bytes that intermediate tensors may take.
        domain: the certified difference quotient is of two points in this set.
        progress: see `shown_progress`.

    Returns:
        One `LowerBound` per state dict.

    Raises:
        ArgumentError, NonFiniteError: the samples do not fit, or hold NaN or Inf.
        StateDictError, NonFiniteError: a state dict does not fit the architecture.
    """
    check_flags(per_sample=per_sample)
    resolved, norm = resolve_later(plan, state_dicts), check_norm(norm)
    options = _Options(plan, norm, per_sample, memory, domain, progress)
    if samples.unread and resolved.networks:
        found = None
        try:
            found = _waiting_twice(options, resolved.networks, samples.first)
        except Exception:  # perhaps of numbers that nothing should be made of
            if resolved.hold():
                raise
        if found is not None and resolved.hold():
            return found
    tensors = resolved.settled()
    if not tensors:
        return []
    if samples.unread:
        check_inputs(samples.first if len(samples.first) > 1 else samples.first[0])
    largest = Largest()
    with shown_progress("Jacobian norms", samples.count, progress) as advance:
        for batch in samples:
            x = _batch_as_one(plan, tensors, batch)
            largest.take(x, finite_norms(plan, tensors, x, norm, memory))
            advance(len(x))
    points, on_cpu = largest.points, largest.points.is_cpu
    secants = options.secants(tensors, points, in_norm=on_cpu)
    if secants is not None and not on_cpu:
        secants, loose = secants.read()
        secants = options.tightened(tensors, points, secants, loose)
    return options.assembled(largest.of_each_network(), secants)


class _Options(NamedTuple):
    """What a call was asked for; see `lower_bounds`."""

    plan: Architecture
    norm: Norm
    per_sample: bool
    memory: int
    domain: Domain | None
    progress: bool | None

    def secants(
        self, tensors: Sequence[Mapping[str, Tensor]], points: Tensor, *, in_norm: bool
    ) -> Secants | None:
        """Certified secants next to the best samples, where there may be some."""
        if self.why_not is not None:
            return None
        with shown_progress("certified secants", None, self.progress):
            return certified_secants(
                self.plan,
                tensors,
                points,
                norm=self.norm,
                memory=self.memory,
                domain=self.domain,
                in_norm=in_norm,
            )

    def tightened(
        self,
        tensors: Sequence[Mapping[str, Tensor]],
        points: Tensor,
        secants: Secants,
        loose: Sequence[int],
    ) -> Secants:
        """Secants on a device, of which some are loose, with errors bounded in norm."""
        if not loose:
            return secants
        again = secants_in_norm(
            self.plan,
            [tensors[index] for index in loose],
            torch.stack([points[index] for index in loose]),
            norm=self.norm,
            memory=self.memory,
            domain=self.domain,
        )
        return secants.replaced(loose, again)

    @property
    def why_not(self) -> str | None:
        return why_not_certified(self.plan, len(self.plan.input_shapes))

    def assembled(self, found: Sequence[Sample], secants: Secants | None) -> list[LowerBound]:
        """The bounds of all networks."""
        flushed, why_not = denormals_flushed(), self.why_not
        proved = [None] * len(found) if secants is None else secants.of_each()
        return [
            assembled(
                sample,
                norm=self.norm,
                plan=self.plan,
                keep=self.per_sample,
                secant=secant,
                why_not=why_not,
                flushed=flushed,
            )
            for sample, secant in zip(found, proved, strict=True)
        ]


def _waiting_twice(
    options: _Options, tensors: Sequence[Mapping[str, Tensor]], batch: Sequence[Tensor]
) -> list[LowerBound] | None:
    """Bounds from one batch on a device, for which the host waits once, at the end.

    Where norms have not converged it waits for more steps once more. None where something is not
    finite (a sample, or a norm in float32), or not as it was taken to be (a BatchNorm that cannot
    be folded, a wrong derivative).
    """
    x = _batch_as_one(options.plan, tensors, batch)
    with shown_progress("Jacobian norms", len(x), options.progress):
        later = plan_norms_later(options.plan, tensors, x, norm=options.norm, memory=options.memory)
    flags = later.fetched()
    first = _QueuedBounds(options, tensors, x, later.values)
    if not (first.is_finite() and flags.hold()):
        return None
    unfinished = flags.unfinished()
    if not unfinished:
        return first.bounds()
    some = list(unfinished)
    own = [tensors[network] for network in some]
    again = _QueuedBounds(options, own, x, later.again(some, list(unfinished.values())))
    if not again.is_finite():
        return None
    found = first.bounds([network for network in range(len(tensors)) if network not in unfinished])
    for network, bound in zip(some, again.bounds(), strict=True):
        found[network] = bound
    return found


class _QueuedBounds:
    """Lower bounds of networks from the norms at one batch, on their way from a device."""

    def __init__(
        self,
        options: _Options,
        tensors: Sequence[Mapping[str, Tensor]],
        x: Tensor,
        norms: Tensor,
    ) -> None:
        self._options, self._tensors, self._count = options, tensors, len(x)
        self._largest = Largest()
        self._largest.take(x, norms)
        self._secants = options.secants(tensors, self._largest.points, in_norm=False)
        size = torch.linalg.vector_norm(x, math.inf, dtype=torch.float64)
        columns = [
            *self._largest.best(),
            norms.mean(1, dtype=torch.float64),
            torch.linalg.vector_norm(norms, 2, 1, dtype=torch.float64),
            size.expand(len(norms)),
        ]
        if self._secants is not None:
            columns += [self._secants.values, self._secants.loose]
        self._columns = torch.stack([column.double() for column in columns])
        self._read: list[list[float]] | None = None

    def is_finite(self) -> bool:
        """Whether all norms and samples are; waits for the device."""
        self._read = self._columns.tolist()
        values, _, _, _, sizes, *_ = self._read
        # The largest of some norms is NaN if one of them is.
        return all(map(math.isfinite, (*values, sizes[0])))

    def bounds(self, right: Sequence[int] | None = None) -> list[LowerBound]:
        """Those of all networks, of which only the `right` ones are to be used."""
        assert self._read is not None
        values, positions, means, lengths, _, *proved = self._read
        squares = [length / math.sqrt(self._count) for length in lengths]
        secants, options = self._secants, self._options
        if secants is not None:
            secants = replace(secants, known=proved[0])
            chosen = range(len(self._tensors)) if right is None else right
            loose = [index for index in chosen if proved[1][index]]
            secants = options.tightened(self._tensors, self._largest.points, secants, loose)
        found = self._largest.of_each_network((values, positions, means, squares))
        return options.assembled(found, secants)


def _batch_as_one(
    plan: Architecture, tensors: Sequence[Mapping[str, Tensor]], batch: Sequence[Tensor]
) -> Tensor:
    """A batch as one tensor; several inputs in the dtype of the computation."""
    x = batch[0].detach()
    if len(batch) > 1:
        dtype = compute_dtype(tensors, plan.stored_parameters)
        x = joined_inputs([value.detach() for value in batch], dtype)
    require_one_device(x, tensors)
    return x


def require_one_device(x: Tensor, tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Check that samples and parameters are on one device.

    Raises:
        ArgumentError: they are not; says where which are.
    """
    for name, value in tensors[0].items():
        if value.device != x.device:
            raise ArgumentError(
                f"the samples are on {x.device} and parameter '{name}' on {value.device}: move the "
                f"samples (x.to({str(value.device)!r})) or the parameters"
            )


def why_not_certified(plan: Architecture | str, inputs: int) -> str | None:
    """Why nothing can be certified; None where something can.

    Args:
        plan: of the model, or why it has none.
        inputs: how many it has.
    """
    if inputs > 1:
        return "the certificate needs a model with one input"
    if isinstance(plan, str):
        return f"the certificate needs a model that lipfast.compile can trace: {plan}"
    missing = missing_error_rules(plan)
    if not missing:
        return None
    return (
        f"no rule for the rounding errors of {', '.join(missing)}: give its @lipfast.rule an "
        "`error`, which bounds them"
    )


class Largest:
    """Norms of all samples of some networks, and the sample with the largest norm of each.

    Attributes:
        points: (networks, D...), these samples.
    """

    points: Tensor
    _values: Tensor
    _positions: Tensor

    def __init__(self) -> None:
        self._norms: list[Tensor] = []
        self._count = 0

    def take(self, x: Tensor, norms: Tensor) -> None:
        """See a batch (b, D...) with its norms (networks, b)."""
        values, positions = norms.max(1)
        points = x[positions]
        if self._norms:
            positions = positions + self._count
            better = values > self._values
            values = torch.where(better, values, self._values)
            positions = torch.where(better, positions, self._positions)
            points = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), points, self.points)
        self._values, self._positions, self.points = values, positions, points
        self._norms.append(norms)
        self._count += len(x)

    @property
    def norms(self) -> Tensor:
        """Those of all samples, (networks, samples)."""
        if len(self._norms) > 1:
            self._norms = [torch.cat(self._norms, 1)]
        return self._norms[0]

    def best(self) -> tuple[Tensor, Tensor]:
        """Largest norm and its sample's position, (networks,) each."""
        return self._values, self._positions

    def statistics(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Largest norm, its sample's position, mean and root mean square, (networks,) each."""
        wide = self.norms.double()
        return *self.best(), wide.mean(1), wide.square().mean(1).sqrt()

    def of_each_network(self, known: Sequence[Sequence[float]] | None = None) -> list[Sample]:
        """What was found of each network; `known` are the `statistics`, if they are on the host."""
        if known is None:
            known = torch.stack([column.double() for column in self.statistics()]).tolist()
        values, positions, means, squares = known
        columns = zip(self.norms, values, positions, self.points, means, squares, strict=True)
        return [
            Sample(norms, value, int(position), point, mean, square)
            for norms, value, position, point, mean, square in columns
        ]
