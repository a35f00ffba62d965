"""Whether a traced graph is the module: both are evaluated on several batches, and compared.

A trace sees what torch is called with. What goes through `Tensor.data`, what Python decides by the
number of samples or because it is traced, and random numbers leave no sign in it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipfast.errors import NonFiniteError, StateDictError, TraceError
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import resolve
from lipfast.plan.conditions import Asked
from lipfast.plan.evaluated import evaluated
from lipfast.plan.gaps import (
    Gaps,
    Roundings,
    are_alike,
    beyond_half_of_the_digits,
    beyond_rounding,
    gaps_between,
)
from lipfast.plan.interpret import evaluate
from lipfast.plan.kept import Kept
from lipfast.plan.modules import copied, evaluation_mode
from lipfast.plan.outputs import returned_tensors
from lipfast.plan.state import stack

# Numbers of samples, the most telling ones first; how many were given comes after these.
_SIZES = (2, 3, 9, 1, 33, 5, 8, 4, 7, 6, 17)
# Always tried: the first two samples as they are, and with an invented one.
_LEAST = 2
# Numbers (activations of all samples, and parameters) that further batches may take together.
_BUDGET = 1 << 23
# Where random numbers are drawn: a mask that drops one number in a hundred often drops none.
_REPEATS = 50
# Parameters that are copied to another precision: a check should not take more than its model.
_LARGEST_COPY = 1 << 26
_OTHER = {torch.float64: torch.float32}


def require_faithful(
    module: nn.Module,
    inputs: Sequence[Tensor],
    plan: Architecture,
    answers: Sequence[Any] | None = None,
) -> None:
    """Check that a module gives what its graph gives, on batches of several sizes.

    A module without numbers (device meta) is taken for its graph. If the plan refuses its weights,
    it is evaluated once and not compared.

    Args:
        module: left as it is found.
        inputs: at least two samples of each input.
        plan: what the module was traced to.
        answers: what Python was told of buffers in the trace, if it asked; see `plan.conditions`.

    Raises:
        TraceError: it cannot be evaluated on the inputs, writes to its tensors, is random, is told
            something else than its trace, or gives something else.
    """
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        return
    with evaluation_mode(module) as kept:
        kept.keep_generators()
        _Comparison(module, kept, plan, answers).run(tuple(inputs))


@dataclass
class _Batch:
    """Some of the samples that the graph is evaluated on, by their rows there."""

    rows: slice
    inputs: tuple[Tensor, ...]
    gradients: bool = False

    @property
    def invented(self) -> bool:
        return self.rows != slice(0, 2)

    def to(self, dtype: torch.dtype) -> _Batch:
        return _Batch(self.rows, tuple(value.to(dtype) for value in self.inputs), self.gradients)


class _Comparison:
    """A module in `evaluation_mode`, beside its graph."""

    def __init__(
        self, module: nn.Module, kept: Kept, plan: Architecture, answers: Sequence[Any] | None
    ) -> None:
        self.module, self.kept, self.plan, self.answers = module, kept, plan, answers
        self.name = type(module).__name__
        self._seeds = itertools.count(1)

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """See `require_faithful`."""
        pool, batches = _batches(inputs, self.plan)
        first = batches[0]
        self._reseed()
        before = _generators()
        outputs = self._outputs(first)
        drawn = _generators() != before
        self._require_nothing_written()
        try:
            state = resolve(self.plan, self.module.state_dict())
        except (NonFiniteError, StateDictError):  # no bound is computed of these weights
            return
        expected = _of_graph(self.plan, state, pool)
        suspects: list[tuple[_Batch, Gaps]] = []
        for batch in batches:
            if batch is not first:
                self._reseed()
                outputs = self._outputs(batch)
            gaps = _compared(outputs, expected, batch)
            if gaps is not None and not are_alike(gaps, inputs[0].dtype):
                suspects.append((batch, gaps))
        eps = torch.finfo(inputs[0].dtype).eps
        other = any(beyond_half_of_the_digits(gaps, eps) is not None for _, gaps in suspects)
        for _ in range(_REPEATS if drawn or other else 0):
            self._require_repeatable(suspects[0][0] if suspects else first)
        if suspects:
            self._require_rounding(suspects, state, pool)

    def _outputs(self, batch: _Batch) -> Tensor | None:
        """Outputs (samples, K); None where it fails on what nobody gave: nothing follows then."""
        asking = nullcontext() if self.answers is None else Asked()
        try:
            with asking as asked:
                outputs = evaluated(self.module, batch.inputs, gradients=batch.gradients)
        except TraceError:
            if batch.invented:
                return None
            raise
        if asked is not None and repr(asked.answers) != repr(list(self.answers or ())):
            raise TraceError(
                f"{self.name} decides by values that are not those of its buffers alone: it writes "
                "them before, or the samples and their number take part. Such a model has no "
                "graph; decide by numbers of Python"
            )
        return _joined(outputs, batch)

    def _reseed(self) -> None:
        """The module as it was found, and all generators in another state each time."""
        self.kept.restore()
        seed = next(self._seeds)
        random.seed(seed)
        np.random.seed(seed)
        for generator in (torch.default_generator, *torch.cuda.default_generators):
            generator.manual_seed(seed)

    def _require_nothing_written(self) -> None:
        written = self.kept.rewritten()
        if written:
            raise TraceError(
                f"{self.name} writes its {', '.join(written)} in forward, even in eval mode: then "
                "its outputs are no function of parameters and inputs that can be traced. Evaluate "
                "the model once, if this initialises it, or write in training mode only "
                "(if self.training)"
            )

    def _require_repeatable(self, batch: _Batch) -> None:
        self._reseed()
        first = self._outputs(batch)
        self._reseed()
        second = self._outputs(batch)
        if first is None or second is None or first.shape != second.shape:
            return
        # Sums of a device's atomic additions change from time to time, in their last digits.
        eps = torch.finfo(batch.inputs[0].dtype).eps
        changed = beyond_half_of_the_digits(gaps_between(first, second), eps)
        if changed is not None:
            raise TraceError(
                f"{self.name} is random: for the same samples an output changes by {changed:.3g} "
                "when it is evaluated again in eval mode, with other seeds of torch, numpy and "
                "Python. Draw random numbers in training mode only (if self.training)"
            )

    def _require_rounding(
        self,
        suspects: Sequence[tuple[_Batch, Gaps]],
        state: Mapping[str, Tensor],
        pool: tuple[Tensor, ...],
    ) -> None:
        """Check that all differences shrink in float64 as rounding does."""
        dtype = pool[0].dtype
        other = _OTHER.get(dtype, torch.float64)
        again = self._in(other)
        expected = None
        if again is not None:
            expected = _of_graph(self.plan, state, tuple(value.to(other) for value in pool))
        for batch, gaps in suspects:
            beyond: float | None = None
            with Roundings(dtype) as inside:
                _outputs_or_none(self.module, batch)
            others, wide = None, inside
            if again is not None and expected is not None:
                typed = batch.to(other)
                with Roundings(other) as elsewhere:
                    outputs = _outputs_or_none(again, typed)
                others = None if outputs is None else _compared(outputs, expected, typed)
                wide = inside if dtype == torch.float64 else elsewhere
            if others is None or wide.eps > torch.finfo(torch.float64).eps:
                beyond = beyond_half_of_the_digits(gaps, inside.eps)
            elif dtype == torch.float64:
                beyond = beyond_rounding(others, gaps)
            else:
                beyond = beyond_rounding(gaps, others)
            if beyond is not None:
                raise TraceError(self._unfaithful(batch, beyond))

    def _in(self, dtype: torch.dtype) -> nn.Module | None:
        """A copy in another precision; None of a large module, and where the two differ more."""
        nodes = (*self.plan.graph.nodes, *self.plan.computed)
        # What is bounded in the place of softplus differs from it by a rounding of float32.
        differs = self.plan.requirements.default_eps or any("softplus" in n.op for n in nodes)
        if differs or _parameters(self.plan) > _LARGEST_COPY:
            return None
        try:
            again = copied(self.module).to(dtype)
        except Exception:  # user code runs here: it may not be copied
            return None
        for module in again.modules():
            for name, value in vars(module).items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    vars(module)[name] = value.to(dtype)
        return again

    def _unfaithful(self, batch: _Batch, difference: float) -> str:
        count = len(batch.inputs[0])
        return (
            f"{self.name} does not compute what its traced graph computes: for {count} "
            f"sample{'s' * (count > 1)} an output differs by {difference:.3g}. It does something "
            "that a trace does not see: it writes through .data, numpy or detached tensors, or "
            "decides by the number of samples, by their values, by whether gradients are recorded "
            "or whether it is traced (try around float(x), type(x), torch.compiler.is_exporting()), "
            "or it keeps what it computed of other samples"
        )


def _parameters(plan: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in plan.parameters.values())


def _batches(inputs: tuple[Tensor, ...], plan: Architecture) -> tuple[tuple[Tensor, ...], list[_Batch]]:
    """All samples that are tried, and in which batches: the first two as they were given first."""
    activations = sum(torch.Size(node.shape).numel() for node in plan.graph.nodes)
    parameters, budget, sizes = _parameters(plan), _BUDGET, []
    for size in dict.fromkeys((*_SIZES[:4], len(inputs[0]), *_SIZES[4:])):
        budget -= size * activations + parameters
        if len(sizes) < _LEAST or budget >= 0:
            sizes.append(size)
    generator = torch.Generator().manual_seed(0)
    pool = tuple(_samples(value, max(sizes), generator) for value in inputs)
    batches, start = [], 0
    for index, size in enumerate(sizes):
        first = start if index > 1 and start + size <= max(sizes) else 0
        rows = slice(first, first + size)
        batches.append(_Batch(rows, tuple(value[rows] for value in pool), index % 2 == 1))
        start = rows.stop
    return pool, batches


def _samples(given: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first two of the samples, and invented ones, of other sizes and signs."""
    size = float(given.double().square().mean().sqrt())
    size = size if 0 < size < float("inf") else 1.0
    found = [given[0], given[1]]
    for row in range(2, count):
        noise = size * torch.randn(given.shape[1:], generator=generator, dtype=torch.float64)
        noise = noise.to(given.device, given.dtype)
        near = given[row % len(given)]
        found.append((noise, -near, 4 * noise, near + noise / 8, 2 * near)[(row - 2) % 5])
    return torch.stack(found)


def _of_graph(
    plan: Architecture, state: Mapping[str, Tensor], pool: tuple[Tensor, ...]
) -> Tensor:
    """Outputs (samples, K) of the graph."""
    parameters = stack([state], plan.used_parameters, pool[0].dtype)
    inputs = [value.to(pool[0].dtype).unsqueeze(0) for value in pool]
    with torch.no_grad():
        return evaluate(plan.graph, parameters, plan.constants, inputs)[0]


def _outputs_or_none(module: nn.Module, batch: _Batch) -> Tensor | None:
    try:
        return _joined(evaluated(module, batch.inputs, gradients=batch.gradients), batch)
    except TraceError:
        return None


def _joined(outputs: object, batch: _Batch) -> Tensor:
    """All outputs (samples, K) as one tensor; without rows where their number is another one."""
    count = len(batch.inputs[0])
    tensors = [value.detach() for value in returned_tensors(outputs)]
    if count > 1 and any(value.dim() == 0 or len(value) != count for value in tensors):
        return tensors[0].new_empty(0, 0)
    dtype = torch.float64
    return torch.cat([value.reshape(count, -1).to(dtype) for value in tensors], 1)


def _compared(outputs: Tensor | None, expected: Tensor, batch: _Batch) -> Gaps | None:
    """Differences in each row; None where there is nothing to compare."""
    if outputs is None:
        return None
    wanted = expected[batch.rows]
    if outputs.shape != wanted.shape:
        if len(wanted) == 1:  # a dimension of one may be gone (squeeze)
            return None
        return torch.full((1,), torch.inf), torch.ones(1)
    if not outputs.numel():
        return None
    if batch.invented:  # what overflows, or is outside of the domain of a logarithm
        sound = outputs.isfinite() & wanted.isfinite()
        outputs, wanted = outputs.where(sound, 0), wanted.where(sound, 0)
    return gaps_between(outputs, wanted)


def _generators() -> tuple[Any, ...]:
    """In which state random numbers are."""
    of_numpy = np.random.get_state()
    sources: Iterator[torch.Generator] = iter(
        (torch.default_generator, *torch.cuda.default_generators)
    )
    of_torch = tuple(bytes(source.get_state().numpy()) for source in sources)
    return (random.getstate(), repr(of_numpy[2:]), bytes(of_numpy[1]), of_torch)
