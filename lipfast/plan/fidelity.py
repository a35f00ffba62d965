"""Whether a traced graph is the module: both are evaluated on several batches, and compared.

A trace sees what torch is called with. What goes through `Tensor.data`, what Python decides by the
number of samples or because it is traced, and random numbers leave no sign in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lipfast.errors import LipfastError, NonFiniteError, StateDictError, TraceError
from lipfast.graph.nodes import Reference
from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import resolve
from lipfast.plan.conditions import Asked
from lipfast.plan.evaluated import evaluate_module, require_nothing_written
from lipfast.plan.gaps import (
    LARGEST_COPY,
    REPEATS,
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
from lipfast.plan.values_read import ValuesRead

# Numbers of samples that are always tried, and those that are where they cost little.
_ALWAYS = (2, 3, 1)
_FURTHER = (9, 33, 5, 8, 4, 7, 6, 17)
# Numbers (activations of all samples, and parameters) that the further ones may take together.
_BUDGET = 1 << 23
_SINGLE, _DOUBLE = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
_OTHER = {torch.float64: torch.float32}


def require_faithful(
    module: nn.Module,
    inputs: Sequence[Tensor],
    plan: Architecture,
    answers: list[Any] | None = None,
    trace_again: Callable[[nn.Module, tuple[Tensor, ...]], Architecture] | None = None,
) -> None:
    """Check that a module gives what its graph gives, on batches of several sizes.

    Each evaluation, with gradients or without, is of the module as it was found. A module without
    numbers (device meta) is taken for its graph. If the plan refuses its weights, it is evaluated
    once and not compared.

    Args:
        module: left as it is found.
        inputs: at least two samples of each input.
        plan: what the module was traced to.
        answers: what Python was told of buffers in the trace, if it asked; see `plan.conditions`.
        trace_again: traces a copy in another precision, where numbers that depend on it
            (``torch.finfo(x.dtype).eps``) are others.

    Raises:
        TraceError: it cannot be evaluated on the inputs, writes to its tensors, is random, is told
            something else than its trace, or gives something else.
    """
    if any(value.is_meta for value in (*module.parameters(), *module.buffers())):
        return
    with evaluation_mode(module) as kept:
        kept.keep_generators()
        _Comparison(module, kept, plan, answers, trace_again).run(tuple(inputs))


@dataclass(frozen=True)
class _Trial:
    """Some of the samples that the graph is evaluated on, by their rows there."""

    rows: slice
    inputs: tuple[Tensor, ...]
    gradients: bool = False
    watched: bool = False

    @property
    def given(self) -> bool:
        """Whether these are samples of the caller."""
        return self.rows == slice(0, 2)

    def to(self, dtype: torch.dtype) -> _Trial:
        return _Trial(self.rows, tuple(value.to(dtype) for value in self.inputs), self.gradients)


class _Comparison:
    """A module in `evaluation_mode`, beside its graph."""

    def __init__(
        self,
        module: nn.Module,
        kept: Kept,
        plan: Architecture,
        answers: list[Any] | None,
        trace_again: Callable[[nn.Module, tuple[Tensor, ...]], Architecture] | None,
    ) -> None:
        self.module, self.kept, self.plan, self.answers = module, kept, plan, answers
        self.trace_again = trace_again
        self.name = type(module).__name__

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        """See `require_faithful`."""
        pool, batches = _batches_of(inputs, self.plan)
        outputs = self._outputs(batches[0])
        drawn = self.kept.drew()
        self.kept.restore()
        try:
            state = resolve(self.plan, self.module.state_dict())
        except (NonFiniteError, StateDictError):  # no bound is computed of these weights
            return
        expected = _of_graph(self.plan, state, pool)
        # Where numbers are short, a few units in the last place are much.
        short = torch.finfo(pool[0].dtype).eps > _SINGLE
        suspects: list[tuple[_Trial, Gaps]] = []
        for batch in batches:
            if batch is not batches[0]:
                self.kept.restore()
                outputs = self._outputs(batch)
            gaps = self._differences(outputs, expected, batch)
            if gaps is not None and (short or not are_alike(gaps, pool[0].dtype)):
                suspects.append((batch, gaps))
        if drawn or suspects:
            self._require_repeatable(batches[0], drawn)
        if suspects:
            self._require_rounding(suspects, state, pool)

    def _outputs(self, batch: _Trial) -> Tensor | None:
        """Outputs (samples, K); None where it fails on what nobody gave: nothing follows then."""
        # These change what torch's own attention computes with, so not all batches are watched.
        watching = ValuesRead(batch.inputs) if batch.watched else nullcontext()
        asking = nullcontext() if self.answers is None else Asked()
        try:
            with watching as watched, asking as asked:
                outputs = evaluate_module(self.module, batch.inputs, gradients=batch.gradients)
        except TraceError:
            if batch.given:
                raise
            return None
        require_nothing_written(self.name, self.kept)
        if watched is not None and watched.at:
            raise TraceError(
                f"{self.name} reads values of its samples (at {watched.at}) where its trace goes "
                "another way, as after try or torch.compiler.is_exporting(): such a model has no "
                "graph. Use torch.where, and keep numbers as tensors"
            )
        if asked is not None and repr(asked.answers) != repr(self.answers):
            raise TraceError(
                f"{self.name} decides by values that are not those of its buffers alone: it writes "
                "them before, or the samples and their number take part. Such a model has no "
                "graph; decide by numbers of Python"
            )
        return _rows_of(outputs, batch)

    def _require_repeatable(self, batch: _Trial, drawn: bool) -> None:
        self.kept.restore()
        first = self._outputs(batch)
        for _ in range(REPEATS if drawn else 1):
            if not drawn:  # else with other random numbers
                self.kept.restore()
            again = self._outputs(batch)
            if first is None or again is None or first.shape != again.shape:
                return
            # Sums of a device's atomic additions change from time to time, in their last digits.
            eps = torch.finfo(batch.inputs[0].dtype).eps
            changed = beyond_half_of_the_digits(gaps_between(first, again), eps)
            if changed is not None:
                raise TraceError(
                    f"{self.name} is random: for the same samples an output changes by "
                    f"{changed:.3g} when it is evaluated again in eval mode. Draw random numbers "
                    "in training mode only (if self.training), and keep nothing between calls"
                )

    def _differences(self, outputs: Tensor | None, expected: Tensor, batch: _Trial) -> Gaps | None:
        """Differences in each row; None where there is nothing to compare."""
        if outputs is None:
            return None
        wanted = expected[batch.rows]
        if outputs.shape != wanted.shape:
            raise TraceError(
                self._unfaithful(batch, "the outputs have other shapes than those of the graph")
            )
        if not outputs.numel():
            return None
        if not batch.given:  # what overflows, or is outside of the domain of a logarithm
            sound = outputs.isfinite() & wanted.isfinite()
            outputs, wanted = outputs.where(sound, 0), wanted.where(sound, 0)
        return gaps_between(outputs, wanted)

    def _require_rounding(
        self,
        suspects: Sequence[tuple[_Trial, Gaps]],
        state: Mapping[str, Tensor],
        pool: tuple[Tensor, ...],
    ) -> None:
        """Check that all differences shrink in float64 as rounding does."""
        dtype = pool[0].dtype
        other = _OTHER.get(dtype, torch.float64)
        self.kept.restore()
        again = self._in(other)
        expected = None
        if again is not None:
            expected = _of_graph(self.plan, state, tuple(value.to(other) for value in pool))
        own = False
        for batch, gaps in suspects:
            self.kept.restore()
            with Roundings(dtype, tables=True) as inside:
                outputs = self._outputs(batch)
            beyond = beyond_half_of_the_digits(gaps, inside.eps)
            if again is not None and expected is not None:
                few = beyond
                beyond = self._beyond(again, expected, batch, gaps, inside)
                if beyond is not None and few is None and not own:
                    own, expected = True, self._own_graph(again, pool, other, expected)
                    beyond = self._beyond(again, expected, batch, gaps, inside)
            if beyond is not None:
                where = self._where(outputs, batch, state, pool)
                raise TraceError(self._unfaithful(batch, f"{where} differs by {beyond:.3g}"))

    def _beyond(
        self, again: nn.Module, expected: Tensor, batch: _Trial, gaps: Gaps, inside: Roundings
    ) -> float | None:
        """The largest difference that is not rounding, by a copy in another precision."""
        dtype = batch.inputs[0].dtype
        other = _OTHER.get(dtype, torch.float64)
        typed = batch.to(other)
        with Roundings(other, tables=True) as elsewhere:
            others = self._differences(_outputs_or_none(again, typed), expected, typed)
        wide = inside if dtype == torch.float64 else elsewhere
        if others is None:
            return beyond_half_of_the_digits(gaps, inside.eps)
        if wide.eps > _DOUBLE:
            finer = others if elsewhere.eps < inside.eps else gaps
            return beyond_half_of_the_digits(finer, min(inside.eps, elsewhere.eps))
        return beyond_rounding(*((others, gaps) if dtype == torch.float64 else (gaps, others)))

    def _own_graph(
        self, again: nn.Module, pool: tuple[Tensor, ...], other: torch.dtype, expected: Tensor
    ) -> Tensor:
        """Outputs of a copy's own graph, if it is this one up to the numbers in it."""
        if self.trace_again is None:
            return expected
        typed = tuple(value.to(other) for value in pool)
        try:
            plan = self.trace_again(again, typed)
            if _form_of(plan) != _form_of(self.plan):
                return expected
            return _of_graph(plan, resolve(plan, again.state_dict()), typed)
        except LipfastError:
            return expected

    def _in(self, dtype: torch.dtype) -> nn.Module | None:
        """A copy in another precision; None of a large module, and where the two differ more."""
        nodes = (*self.plan.graph.nodes, *self.plan.computed)
        # What is bounded in the place of softplus differs from it by a rounding of float32.
        differs = self.plan.requirements.default_eps or any("softplus" in n.op for n in nodes)
        if differs or _entries_of(self.plan) > LARGEST_COPY:
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

    def _where(
        self,
        outputs: Tensor | None,
        batch: _Trial,
        state: Mapping[str, Tensor],
        pool: tuple[Tensor, ...],
    ) -> str:
        """Which output of the module is farthest from the graph's."""
        shapes = self.plan.output_shapes
        if len(shapes) == 1 or outputs is None:
            return "its output"
        gaps = (outputs - _of_graph(self.plan, state, pool)[batch.rows]).abs().nan_to_num(nan=0)
        column = int(gaps.amax(0).argmax())
        ends = accumulate(torch.Size(shape).numel() for shape in shapes)
        number = next(number for number, end in enumerate(ends) if column < end)
        return f"output {number} (of shape {tuple(shapes[number])} for each sample)"

    def _unfaithful(self, batch: _Trial, what: str) -> str:
        count = len(batch.inputs[0])
        return (
            f"{self.name} does not compute what its traced graph computes: for {count} "
            f"sample{'s' * (count > 1)}, gradients {'on' if batch.gradients else 'off'}, {what}. "
            "It does something that a trace does not see: it writes through .data, numpy or "
            "detached tensors, or decides by the number of samples, by their values, by whether "
            "gradients are recorded or whether it is traced (try around float(x), type(x), "
            "torch.compiler.is_exporting()), or it keeps what it computed of other samples. Keep "
            "to functions of torch on the samples and the parameters"
        )


def _form_of(plan: Architecture) -> list[tuple[Any, ...]]:
    """What a graph is, but for numbers in its arguments, dtypes and what torch calls its nodes."""
    numbers: dict[str, int] = {}

    def known(reference: Reference) -> str | int:
        if reference.kind in ("node", "constant"):
            return numbers.setdefault(reference.name, len(numbers))
        return str(reference)

    return [
        (known(Reference("node", node.name)), node.op, node.shape, *map(known, node.references()))
        for node in (*plan.computed, *plan.graph.nodes)
    ]


def _entries_of(plan: Architecture) -> int:
    return sum(torch.Size(shape).numel() for shape in plan.parameters.values())


def _batches_of(
    inputs: tuple[Tensor, ...], plan: Architecture
) -> tuple[tuple[Tensor, ...], list[_Trial]]:
    """All samples that are tried, and in which batches: the first two as they were given first."""
    activations = sum(torch.Size(node.shape).numel() for node in plan.graph.nodes)
    parameters, budget, sizes = _entries_of(plan), _BUDGET, list(_ALWAYS)
    for size in dict.fromkeys((len(inputs[0]), *_FURTHER)):
        budget -= size * activations + parameters
        if size not in _ALWAYS and budget >= 0:
            sizes.append(size)
    generator = torch.Generator("cpu").manual_seed(0)
    pool = tuple(_samples(value, max(sizes), generator) for value in inputs)
    batches, start = [], 0
    for index, size in enumerate(sizes):
        first = start if index > 1 and start + size <= max(sizes) else 0
        rows = slice(first, first + size)
        batches.append(
            _Trial(rows, tuple(value[rows] for value in pool), index % 2 == 1, index < 2)
        )
        start = rows.stop
    return pool, batches


def _samples(given: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first two of the samples, and invented ones, of other sizes and signs."""
    size = float(given.double().square().mean().sqrt())
    size = size if 0 < size < float("inf") else 1.0
    found = [given[0], given[1]]
    for row in range(2, count):
        noise = torch.randn(given.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        noise = (size * noise).to(given.device, given.dtype)
        near = given[row % len(given)]
        found.append((noise, -near, 4 * noise, near + noise / 8, 2 * near)[(row - 2) % 5])
    return torch.stack(found)


def _of_graph(plan: Architecture, state: Mapping[str, Tensor], pool: tuple[Tensor, ...]) -> Tensor:
    """Outputs (samples, K) of the graph, in float32 where the samples' numbers are shorter."""
    dtype = torch.promote_types(pool[0].dtype, torch.float32)
    parameters = stack([state], plan.used_parameters, dtype)
    inputs = [value.to(dtype).unsqueeze(0) for value in pool]
    with torch.no_grad():
        return evaluate(plan.graph, parameters, plan.constants, inputs)[0].double()


def _outputs_or_none(module: nn.Module, batch: _Trial) -> Tensor | None:
    try:
        return _rows_of(evaluate_module(module, batch.inputs, gradients=batch.gradients), batch)
    except TraceError:
        return None


def _rows_of(outputs: object, batch: _Trial) -> Tensor:
    """All outputs (samples, K) as one tensor; without rows where their number is another one."""
    count = len(batch.inputs[0])
    tensors = [value.detach() for value in returned_tensors(outputs)]
    if count > 1 and any(value.dim() == 0 or len(value) != count for value in tensors):
        return tensors[0].new_empty(0, 0)
    rows = [value.reshape(count, -1).double() for value in tensors]
    return torch.cat(rows, 1)
