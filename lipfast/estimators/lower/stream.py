"""Lower bounds of one model from a stream of samples, and from searches beyond them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain
from lipfast.estimators.enclosure import missing_error_rules
from lipfast.estimators.jacobian.function import (
    SampleFunction,
    joined_inputs,
    model_function,
    module_of,
)
from lipfast.estimators.jacobian.norms import compute_dtype, function_jacobian_norms
from lipfast.estimators.lower.sample_maximum import (
    Statistics,
    assembled,
    finite_norms,
    jacobian_label,
)
from lipfast.estimators.lower.search import Landscape, SearchMethod, box_of, require_inside
from lipfast.estimators.lower.search_ascent import Ascent
from lipfast.estimators.lower.search_convex import Convex
from lipfast.estimators.lower.search_neighbourhood import Neighbourhood
from lipfast.estimators.lower.search_pairs import Pairs
from lipfast.estimators.lower.secants import certified_quotient, certified_secants
from lipfast.estimators.options import check_options, home_of
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import LowerBound, Search
from lipfast.estimators.samples import Data, SampleStream, read_samples
from lipfast.norms import Norm
from lipfast.ops.denormals import denormals_flushed
from lipfast.plan.architecture import Architecture
from lipfast.plan.cache import cached_plan
from lipfast.plan.checked import StateDict, resolve, resolve_all
from lipfast.plan.trace import Source

SearchName = Literal["data", "convex", "neighbourhood", "ascent", "pairs"]
_SEARCHES: dict[str, Callable[..., SearchMethod]] = {
    "convex": Convex,
    "neighbourhood": Neighbourhood,
    "ascent": Ascent,
    "pairs": Pairs,
}


# Searches that took a box of their own before there were domains.
_BOXED = ("neighbourhood", "ascent")
_SEVERAL_INPUTS = "the certificate needs a model with one input"


def search_method(
    name: str, options: dict[str, object], domain: Domain | None
) -> tuple[SearchMethod | None, Domain | None]:
    """The search of that name with its options, None for the data alone; and where it looks.

    Raises:
        ArgumentError: an unknown name or option, or a value that does not fit.
    """
    if name not in get_args(SearchName):
        raise ArgumentError(
            f"search must be one of {', '.join(get_args(SearchName))}, not {name!r}"
        )
    region = domain
    if name in _BOXED and options.get("box") is not None:
        if domain is not None:
            raise ArgumentError("box and domain are both given: domain alone says where to look")
        warnings.warn(
            "the option box of a search is deprecated: give domain=lipfast.Box(low, high), which "
            "holds for the certified value too",
            DeprecationWarning,
            stacklevel=3,
        )
        region = box_of(options["box"])
    if name in _BOXED:
        options = {key: value for key, value in options.items() if key != "box"}
    make = _SEARCHES.get(name)
    fields = dataclasses.fields(make) if make is not None else ()  # type: ignore[arg-type]
    known = [field.name for field in fields if field.init]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ArgumentError(
                f"search='{name}' has no option '{option}'; {takes}{home_of(option)}"
            )
    return (None if make is None else make(**options)), region


def lower_bounds(
    plan: Architecture,
    state_dicts: StateDict | Sequence[StateDict],
    samples: SampleStream,
    *,
    norm: Norm,
    per_sample: bool,
    memory: int,
    domain: Domain | None,
    progress: bool | None,
) -> list[LowerBound]:
    """Lower bounds on the Lipschitz constants of many networks, from samples that are read once.

    ``jacobian = max_b ||J(x_b)||`` (Khromov and Singh, 2024) is a lower bound wherever the network
    is differentiable, up to rounding; the bound's `value` is the certified difference quotient
    ``||f(a) - f(b)|| / ||a - b||`` near the arg-max sample (see `estimators.lower.certificate`).

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
    tensors = resolve_all(plan, state_dicts)
    if not tensors:
        return []
    largest = _Largest()
    with shown_progress("Jacobian norms", samples.count, progress) as advance:
        for batch in samples:
            x = batch[0].detach()
            if len(batch) > 1:
                dtype = compute_dtype(tensors, plan.stored_parameters)
                x = joined_inputs([value.detach() for value in batch], dtype)
            largest.take(x, finite_norms(plan, tensors, x, norm, memory))
            advance(len(x))
    missing = missing_error_rules(plan)
    why_not = f"no rule for the rounding errors of {', '.join(missing)}" if missing else None
    if len(plan.input_shapes) > 1:
        why_not = _SEVERAL_INPUTS
    secants = None
    if why_not is None:
        with shown_progress("certified secants", None, progress):
            secants = certified_secants(
                plan, tensors, largest.points, norm=norm, memory=memory, domain=domain
            )
    flushed = denormals_flushed()
    label = jacobian_label(plan, norm)
    return [
        assembled(
            statistics,
            norm=norm,
            label=label,
            point=largest.points[index],
            secant=None if secants is None else secants.of(index),
            why_not=why_not,
            flushed=flushed,
        )
        for index, statistics in enumerate(largest.statistics(keep=per_sample))
    ]


def sampled_lower_bound(
    model: Source,
    data: Data,
    *,
    norm: Norm,
    search: tuple[SearchMethod | None, Domain | None],
    domain: Domain | None,
    per_sample: bool,
    memory: int,
    seed: int,
    progress: bool | None,
) -> LowerBound:
    """See `lipfast.lower_bound`; `search` is what `search_method` returns."""
    method, region = search
    norm = check_options(norm, domain, memory, progress)
    module = module_of(model)
    with read_samples(data) as samples:
        example = samples.first
        shapes = [tuple(value.shape[1:]) for value in example]
        check_options(norm, domain, shapes=shapes)
        if region is not None and len(shapes) > 1:
            region = region.flattened(shapes)
        with _evaluator(module, example, norm, memory, domain) as evaluator:
            largest = _Largest()
            with shown_progress("Jacobian norms", samples.count, progress) as advance:
                for batch in samples:
                    inputs = [value.detach() for value in batch]
                    x = joined_inputs(inputs, evaluator.problem.x.dtype)
                    if method is not None:
                        require_inside(x, region)
                    values = evaluator.norms(x)
                    largest.take(inputs[0] if len(inputs) == 1 else x, values[None])
                    if method is not None:
                        method.observe(x, values)
                    advance(len(values))
            found = None
            if method is not None:
                with shown_progress("search", None, progress) as advance:
                    landscape = evaluator.landscape(module, example, region, seed, advance)
                    found = method.run(landscape)
            with shown_progress("certified secants", None, progress):
                return _bound(evaluator, largest, found, per_sample=per_sample)


class _Largest:
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
        positions = positions + self._count
        if self._norms:
            better = values > self._values
            values = torch.where(better, values, self._values)
            positions = torch.where(better, positions, self._positions)
            points = torch.where(better.reshape(-1, *[1] * (x.dim() - 1)), points, self.points)
        self._values, self._positions, self.points = values, positions, points
        self._norms.append(norms)
        self._count += len(x)

    def statistics(self, *, keep: bool) -> list[Statistics]:
        """Over all samples, for each network."""
        norms = self._norms[0] if len(self._norms) == 1 else torch.cat(self._norms, 1)
        found = zip(norms, self._values.tolist(), self._positions.tolist(), strict=True)
        return [Statistics.of(own, value, place, keep=keep) for own, value, place in found]


@dataclass(frozen=True)
class _Evaluator:
    """The model, ready to be evaluated, and its plan where it has one."""

    problem: SampleFunction
    norms: Callable[[Tensor], Tensor]
    norm: Norm
    memory: int
    domain: Domain | None
    plan: Architecture | None
    tensors: dict[str, Tensor]
    why_not: str | None

    def landscape(
        self,
        module: nn.Module,
        example: tuple[Tensor, ...],
        region: Domain | None,
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
            domain=region,
            memory=self.memory,
            seed=seed,
            advance=advance,
        )


@contextmanager
def _evaluator(
    module: nn.Module,
    example: tuple[Tensor, ...],
    norm: Norm,
    memory: int,
    domain: Domain | None,
) -> Iterator[_Evaluator]:
    with model_function(module, example) as problem:
        plan = cached_plan(module, problem.x[:2]) if len(example) == 1 else None
        why_not = None
        tensors: dict[str, Tensor] = {}
        if plan is None:
            why_not = (
                "the certificate needs a model with one input that lipfast.compile can trace"
                if len(example) == 1
                else _SEVERAL_INPUTS
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

        yield _Evaluator(problem, norms, norm, memory, domain, plan, tensors, why_not)


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
    evaluator: _Evaluator, largest: _Largest, found: Search | None, *, per_sample: bool
) -> LowerBound:
    point = largest.points[0]
    plan = evaluator.plan
    secant = None
    if plan is not None and evaluator.why_not is None:
        secant = _best_secant(evaluator, plan, point, found)
    label = "maximum Jacobian norm (autograd)"
    return assembled(
        largest.statistics(keep=per_sample)[0],
        norm=evaluator.norm,
        label=label if plan is None else jacobian_label(plan, evaluator.norm),
        point=point,
        secant=secant,
        why_not=evaluator.why_not,
        flushed=denormals_flushed(),
        search=found,
    )


def _best_secant(
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
        domain=evaluator.domain,
    )
    if evaluator.domain is not None:
        given = [evaluator.domain.project(pair[None])[0] for pair in given]
    candidates = [secants.of(index) for index in range(len(places))]
    candidates += [
        certified_quotient(plan, evaluator.tensors, pair, norm=evaluator.norm) for pair in given
    ]
    return max(candidates, key=lambda candidate: candidate[0])
