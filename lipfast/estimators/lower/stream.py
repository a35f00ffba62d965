"""Lower bounds of one model from a stream of samples, and from searches beyond them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.enclosure import missing_error_rules
from lipfast.estimators.jacobian.function import (
    SampleFunction,
    check_memory,
    joined,
    model_function,
    module_of,
)
from lipfast.estimators.jacobian.norms import function_jacobian_norms
from lipfast.estimators.lower.sample_maximum import (
    Statistics,
    assembled,
    finite_norms,
    jacobian_label,
)
from lipfast.estimators.lower.search import Landscape, SearchMethod
from lipfast.estimators.lower.search_ascent import Ascent
from lipfast.estimators.lower.search_convex import Convex
from lipfast.estimators.lower.search_neighbourhood import Neighbourhood
from lipfast.estimators.lower.search_pairs import Pairs
from lipfast.estimators.lower.secants import certified_quotient, certified_secants
from lipfast.estimators.progress import progress
from lipfast.estimators.results import LowerBound, Search
from lipfast.estimators.samples import Data, count_samples, sample_batches
from lipfast.norms import Norm, check_norm
from lipfast.ops.denormals import denormals_flushed
from lipfast.plan.architecture import Architecture
from lipfast.plan.cache import cached_plan
from lipfast.plan.checked import resolve
from lipfast.plan.trace import Source

SearchName = Literal["data", "convex", "neighbourhood", "ascent", "pairs"]
_SEARCHES: dict[str, Callable[..., SearchMethod]] = {
    "convex": Convex,
    "neighbourhood": Neighbourhood,
    "ascent": Ascent,
    "pairs": Pairs,
}


def search_method(name: str, options: dict[str, object]) -> SearchMethod | None:
    """The search of that name with its options; None for the data alone.

    Raises:
        ArgumentError: an unknown name or option, or a value that does not fit.
    """
    if name not in get_args(SearchName):
        raise ArgumentError(
            f"search must be one of {', '.join(get_args(SearchName))}, not {name!r}"
        )
    make = _SEARCHES.get(name)
    fields = dataclasses.fields(make) if make is not None else ()  # type: ignore[arg-type]
    known = [field.name for field in fields if field.init]
    unknown = [option for option in options if option not in known]
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise ArgumentError(f"search='{name}' has no option '{unknown[0]}'; {takes}")
    return None if make is None else make(**options)


def sampled_lower_bound(
    model: Source,
    data: Data,
    *,
    norm: Norm,
    search: SearchMethod | None,
    per_sample: bool,
    memory: int,
    seed: int,
) -> LowerBound:
    """See `lipfast.lower_bound`."""
    norm = check_norm(norm)
    check_memory(memory)
    module = module_of(model)
    # Loaders draw from the global generator, shuffled or not.
    with torch.random.fork_rng(devices=[]):
        batches = sample_batches(data)
        example = next(batches)
        with _evaluator(module, example, norm, memory) as evaluator:
            largest = _Stream(evaluator.problem.x.dtype, search)
            with progress("Jacobian norms", count_samples(data)) as advance:
                largest.take(example, evaluator.norms, advance)
                for batch in batches:
                    largest.take(batch, evaluator.norms, advance)
            found = None
            if search is not None:
                with progress("search", None) as advance:
                    found = search.run(evaluator.landscape(module, example, seed, advance))
            return _bound(evaluator, largest, found, per_sample=per_sample)


class _Stream:
    """Norms of all samples, and the sample with the largest."""

    def __init__(self, dtype: torch.dtype, search: SearchMethod | None) -> None:
        self._dtype = dtype
        self._search = search
        self._norms: list[Tensor] = []
        self._count = 0
        self.largest, self.position = -1.0, 0
        self.point: Tensor | None = None

    def take(
        self,
        batch: tuple[Tensor, ...],
        norms: Callable[[Tensor], Tensor],
        advance: Callable[[int], None],
    ) -> None:
        """Evaluate a batch."""
        x = joined([value.detach() for value in batch], self._dtype)
        values = norms(x)
        value, position = values.max(0)
        if float(value) > self.largest:
            self.largest, self.position = float(value), self._count + int(position)
            self.point = batch[0][position].detach() if len(batch) == 1 else x[position]
        if self._search is not None:
            self._search.observe(x, values)
        self._norms.append(values)
        self._count += len(values)
        advance(len(values))

    def statistics(self, *, keep: bool) -> Statistics:
        """Over all samples."""
        return Statistics.of(torch.cat(self._norms), self.largest, self.position, keep=keep)


@dataclass(frozen=True)
class _Evaluator:
    """The model, ready to be evaluated, and its plan where it has one."""

    problem: SampleFunction
    norms: Callable[[Tensor], Tensor]
    norm: Norm
    memory: int
    plan: Architecture | None
    tensors: dict[str, Tensor]
    why_not: str | None

    def landscape(
        self,
        module: nn.Module,
        example: tuple[Tensor, ...],
        seed: int,
        advance: Callable[[int], None],
    ) -> Landscape:
        """What a search needs."""
        return Landscape(
            norms=self.norms,
            function=self.problem.function,
            outputs=self.problem.outputs,
            constants=self.problem.constants,
            module=module,
            example=tuple(value[:1] for value in example),
            norm=self.norm,
            memory=self.memory,
            seed=seed,
            advance=advance,
        )


@contextmanager
def _evaluator(
    module: nn.Module, example: tuple[Tensor, ...], norm: Norm, memory: int
) -> Iterator[_Evaluator]:
    with model_function(module, example) as problem:
        plan = cached_plan(module, problem.x[:2]) if len(example) == 1 else None
        why_not = None
        tensors: dict[str, Tensor] = {}
        if plan is None:
            why_not = (
                "the certificate needs a model with one input that lipfast.compile can trace"
                if len(example) == 1
                else "the certificate needs a model with one input"
            )
        else:
            tensors = resolve(plan, module.state_dict())
            missing = missing_error_rules(plan)
            if missing:
                why_not = f"no rule for the rounding errors of {', '.join(missing)}"

        def norms(x: Tensor) -> Tensor:
            if plan is not None:
                return finite_norms(plan, [tensors], x, norm, memory)[0]
            return _norms_without_plan(module, problem, example, x, norm=norm, memory=memory)

        yield _Evaluator(problem, norms, norm, memory, plan, tensors, why_not)


def _norms_without_plan(
    module: nn.Module,
    problem: SampleFunction,
    example: tuple[Tensor, ...],
    x: Tensor,
    *,
    norm: Norm,
    memory: int,
) -> Tensor:
    """Without a plan; samples that overflow float32 again in float64."""

    def of(function: SampleFunction, points: Tensor) -> Tensor:
        problem = dataclasses.replace(function, x=points)
        return function_jacobian_norms(problem, norm=norm, method="auto", memory=memory).values

    values = of(problem, x)
    broken = ~torch.isfinite(values)
    if not bool(broken.any()):
        return values
    with model_function(module, [value[:2] for value in example], dtype=torch.float64) as wide:
        again = of(wide, x[broken].double())
    values = values.double()
    values[broken] = torch.nan_to_num(again, nan=torch.inf, posinf=torch.inf)
    return values


def _bound(
    evaluator: _Evaluator, largest: _Stream, found: Search | None, *, per_sample: bool
) -> LowerBound:
    assert largest.point is not None
    plan = evaluator.plan
    secant = None
    if plan is not None and evaluator.why_not is None:
        secant = _certified(evaluator, plan, largest.point, found)
    label = "maximum Jacobian norm (autograd)"
    return assembled(
        largest.statistics(keep=per_sample),
        norm=evaluator.norm,
        label=label if plan is None else jacobian_label(plan, evaluator.norm),
        point=largest.point,
        secant=secant,
        why_not=evaluator.why_not,
        flushed=denormals_flushed(),
        search=found,
    )


def _certified(
    evaluator: _Evaluator, plan: Architecture, point: Tensor, found: Search | None
) -> tuple[float, Tensor]:
    """The best certified quotient: next to the best sample, and where the search ended."""
    places = [point.double()]
    given = []
    if found is not None and len(found.points):
        best = found.points[0].double()
        if best.dim() > point.dim():
            given.append(best)
        else:
            places.append(best)
    secants = certified_secants(
        plan,
        [evaluator.tensors] * len(places),
        torch.stack(places),
        norm=evaluator.norm,
        memory=evaluator.memory,
    )
    candidates = [secants.of(index) for index in range(len(places))]
    candidates += [
        certified_quotient(plan, evaluator.tensors, pair, norm=evaluator.norm) for pair in given
    ]
    return max(candidates, key=lambda candidate: candidate[0])
