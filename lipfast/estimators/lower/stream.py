"""Lower bounds of one model from a stream of samples, and from searches beyond them."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lipfast.errors import ArgumentError
from lipfast.estimators.domain import Domain
from lipfast.estimators.jacobian.function import (
    SampleFunction,
    joined_inputs,
    model_function,
    module_of,
)
from lipfast.estimators.jacobian.methods import function_jacobian_norms
from lipfast.estimators.jacobian.trust import require_autograd
from lipfast.estimators.lower.many_networks import Largest, why_not_certified
from lipfast.estimators.lower.sample_maximum import assembled, finite_norms
from lipfast.estimators.lower.search import Landscape, SearchMethod, box_of, require_inside
from lipfast.estimators.lower.search_ascent import Ascent
from lipfast.estimators.lower.search_convex import Convex
from lipfast.estimators.lower.search_neighbourhood import Neighbourhood
from lipfast.estimators.lower.search_pairs import Pairs
from lipfast.estimators.lower.secants import certified_quotient, certified_secants
from lipfast.estimators.options import check_flags, check_options, home_of
from lipfast.estimators.progress import shown_progress
from lipfast.estimators.results import LowerBound, Search
from lipfast.estimators.samples import Data, read_samples
from lipfast.norms import AnyNorm, Norm
from lipfast.ops._arguments import check_integer
from lipfast.ops.denormals import denormals_flushed
from lipfast.plan.architecture import Architecture
from lipfast.plan.cache import plan_or_reason
from lipfast.plan.checked import StateDict, resolve
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


def search_method(
    name: str, options: dict[str, object], domain: Domain | None
) -> tuple[SearchMethod | None, Domain | None]:
    """The search of that name with its options, None for the data alone; and where it looks.

    Raises:
        ArgumentError: an unknown name or option, or a value that does not fit.
    """
    if not isinstance(name, str) or name not in get_args(SearchName):
        raise ArgumentError(
            f"search must be one of {', '.join(get_args(SearchName))}, not {name!r}"
        )
    region, box = domain, None
    if name in _BOXED:
        box = options.get("box")
        options = {key: value for key, value in options.items() if key != "box"}
    if box is not None:
        if domain is not None:
            raise ArgumentError("box and domain are both given: domain alone says where to look")
        warnings.warn(
            "the option box of a search is deprecated: give domain=lipfast.Box(low, high), which "
            "holds for the certified value too",
            DeprecationWarning,
            stacklevel=3,
        )
        region = box_of(box)
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


def lower_bound(
    model: Source,
    data: Data,
    *,
    norm: AnyNorm = 2,
    search: SearchName = "data",
    per_sample: bool = False,
    memory: int = 1 << 30,
    seed: int = 0,
    domain: Domain | None = None,
    progress: bool | None = None,
    **options: object,
) -> LowerBound:
    """Lower bound on the Lipschitz constant of a model, found from data and certified.

    The value is a difference quotient ``||f(a) - f(b)|| / ||a - b||`` of two stored points next to
    the sample whose Jacobian norm is largest, with all rounding errors accounted for. That norm
    itself is `.jacobian`, not certified; `.mean` and `.rms` are over all samples. Where the model
    cannot be traced into a graph with rules for rounding errors, the value is the largest norm,
    not certified, and `.reason` says why.

    `search` looks beyond the data. What it finds is `.search`, labelled, with its points; the
    certified value is the better of the quotients there and at the best sample.

    Args:
        model: a module, an exported program or the path of a ``.pt2`` file; left as it is found.
        data: samples (B, D...); a tuple of tensors for a model with several inputs (flattened and
            joined); or a Dataset or DataLoader of tensors, or of tuples with the samples first (a
            tuple again for several inputs). Batches are read once.
        norm: 1, 2 or inf.
        search: ``data``: the samples only. ``convex``: convex combinations of them (S*; options
            draws, limit). ``neighbourhood``: random points around them (radius, noise, draws,
            centres). ``ascent``: gradient ascent on the Jacobian norm (steps, starts, step) from
            the best samples; starts_from="convex" adds the best convex combinations (draws, limit),
            "pattern" inputs with nearly the slopes of the largest Jacobian that slopes make, and
            ("convex", "pattern") both: more time, and often much larger norms. ``pairs``:
            difference quotients between samples (limit).
        per_sample: keep the Jacobian norm of every sample.
        memory: bytes that intermediate tensors may take.
        seed: of everything random in a search.
        domain: `lipfast.Box` or `lipfast.Ball`: the certified difference quotient is of two points
            in this set, and a search stays in it; then the samples must lie inside. Without a
            search the Jacobian norms are of the samples as they are.
        progress: see `upper_bound`.
        **options: of the search. ``box=(low, high)`` is deprecated: it holds for the search only.

    Returns:
        A `LowerBound`.

    Raises:
        ArgumentError: data, search or options do not fit; the message says which. Or lipfast cannot
            trace the model, and it mixes samples, is random, jumps or alters its gradients.
        NonFiniteError: a weight or a sample is NaN or infinite.
        TraceError: an exported program was exported in training mode.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 0.5]])
        >>> lower = lipfast.lower_bound(model, x)
        >>> round(lower.value, 6), lower.jacobian.value, lower.sample, lower.mean
        (4.0, 4.0, 1, 3.5)
        >>> found = lipfast.lower_bound(model, x, search="pairs")
        >>> round(found.search.estimate.value, 6), round(found.value, 6), found.certified
        (1.333333, 4.0, True)
        >>> found = lipfast.lower_bound(model, x, search="ascent", domain=lipfast.Box(-1, 1))
        >>> bool((found.points.abs() <= 1).all()), bool((found.search.points.abs() <= 1).all())
        (True, True)
    """
    norm = check_options(norm, domain, memory, progress)
    check_integer("seed", seed, 0)
    check_flags(per_sample=per_sample)
    if not isinstance(search, str) or search != "data":
        options = {"seed": int(seed), **options}
    method, region = search_method(search, options, domain)
    module = module_of(model)
    with read_samples(data) as samples, contextlib.ExitStack() as stack:
        example = samples.first
        shapes = [tuple(value.shape[1:]) for value in example]
        check_options(norm, domain, shapes=shapes)
        if region is not None and len(shapes) > 1:
            region = region.flattened(shapes)
        problem = stack.enter_context(model_function(module, example))
        several = "it has several inputs"
        traced = plan_or_reason(module, problem.x[:2]) if len(shapes) == 1 else several
        plan = None if isinstance(traced, str) else traced
        if plan is None:  # autograd differentiates the module itself
            require_autograd(problem, module, example)
        tensors = {} if plan is None else resolve(plan, module.state_dict())

        def norms(x: Tensor) -> Tensor:
            if plan is not None:
                return finite_norms(plan, [tensors], x, norm, memory)[0]
            return _norms_without_plan(module, problem, example, x, norm=norm, memory=memory)

        largest = Largest()
        with shown_progress("Jacobian norms", samples.count, progress) as advance:
            for batch in samples:
                inputs = [value.detach() for value in batch]
                x = joined_inputs(inputs, problem.x.dtype)
                if method is not None:
                    require_inside(x, region)
                values = norms(x)
                largest.take(inputs[0] if len(inputs) == 1 else x, values[None])
                if method is not None:
                    method.observe(x, values)
                advance(len(values))
        found = None
        if method is not None:
            with shown_progress("search", None, progress) as advance:
                one = tuple(value[:1] for value in example)
                spot = (problem, module, one, norm, region, memory, advance, traced, tensors)
                found = method.run(Landscape(norms, *spot))
        why_not, secant = why_not_certified(traced, len(shapes)), None
        with shown_progress("certified secants", None, progress):
            if plan is not None and why_not is None:
                secant = _best_secant(
                    plan, tensors, largest.points[0], found, norm=norm, memory=memory, domain=domain
                )
            return assembled(
                largest.of_each_network()[0],
                norm=norm,
                plan=plan,
                keep=per_sample,
                secant=secant,
                why_not=why_not,
                flushed=denormals_flushed(),
                search=found,
            )


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


def _best_secant(
    plan: Architecture,
    tensors: StateDict,
    point: Tensor,
    found: Search | None,
    *,
    norm: Norm,
    memory: int,
    domain: Domain | None,
) -> tuple[float, Tensor]:
    """The best certified quotient: next to the best sample, and where the search ended."""
    places, pair = [point.double()], None
    if found is not None and len(found.points):
        best = found.points[0].double()
        if best.dim() > point.dim():
            pair = best if domain is None else domain.project(best[None])[0]
        else:
            places.append(best)
    samples = torch.stack(places)
    secants = certified_secants(
        plan, [tensors] * len(places), samples, norm=norm, memory=memory, domain=domain
    )
    candidates = secants.of_each()
    if pair is not None:
        candidates.append(certified_quotient(plan, tensors, pair, norm=norm))
    return max(candidates, key=lambda candidate: candidate[0])
