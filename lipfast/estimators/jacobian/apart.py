"""Whether a model treats the samples of a batch apart, and alike each time.

What is compared are outputs of a sample alone and in company. They may differ by the rounding of
products whose sums are ordered by the batch's size; see docs/bounds.md for how the two are told
apart. A plan needs none of this: each of its ops was checked to keep samples apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import Function, SampleFunction
from lipfast.estimators.jacobian.precision import Other, values_of
from lipfast.plan.gaps import (
    REPEATS,
    Gaps,
    Roundings,
    are_alike,
    beyond_half_of_the_digits,
    beyond_rounding,
    gaps_between,
    worst,
)

_MIXES = (
    "BatchNorm needs running statistics, attention batch_first=True, a mean or a softmax a "
    "dimension other than 0, and a condition must be one per sample (torch.where)"
)
Measure = Callable[[Function, Tensor], Gaps]


def require_apart(problem: SampleFunction, name: str, other: Other) -> None:
    """Compare up to four samples alone and together, each evaluated once if all is well.

    To be used inside `function.differentiating`.

    Args:
        problem: the model and all samples.
        name: of the model, for messages.
        other: the model in the other precision, asked for only if something differs.

    Raises:
        ArgumentError: the samples are mixed, the model cannot be evaluated on one of them alone, or
            it gives other outputs each time.
    """
    generator = _generator_state(problem.x)
    x, rows = _company(problem)

    def alone(function: Function, x: Tensor) -> Gaps:
        together = _outputs(function, x, name)[rows]
        one_by_one = [_outputs(function, x[row : row + 1], name) for row in rows]
        return gaps_between(torch.cat(one_by_one), together)

    gaps = alone(problem.function, x)
    suspect = not are_alike(gaps, x.dtype)
    drawn = not torch.equal(generator, _generator_state(x))
    for _ in range(REPEATS if drawn else int(suspect)):
        _require_repeatable(problem, x, name)
    if not suspect:
        return
    mixed = _unexplained(alone, gaps, problem, x, other)
    if mixed is not None:
        raise ArgumentError(
            f"{name} mixes the samples of a batch: an output of a sample alone and together with "
            f"{len(x) - 1} other{'s' * (len(x) > 2)} differs by {mixed:.3g}, so that no sample has "
            f"a Jacobian of its own. {_MIXES}."
        )


def _require_repeatable(problem: SampleFunction, x: Tensor, name: str) -> None:
    gaps, sizes = gaps_between(values_of(problem.function, x), values_of(problem.function, x))
    # Sums of a device's atomic additions change from time to time, in their last digits.
    changed = worst(gaps, math.sqrt(torch.finfo(x.dtype).eps) * sizes)
    if changed is not None:
        raise ArgumentError(
            f"{name} gives other outputs for the same samples when it is evaluated again: one "
            f"changes by {changed:.3g}. Is it random (F.dropout without training=self.training, "
            "noise in forward), or does it keep something between calls? Its values must depend on "
            "the input only."
        )


def _company(problem: SampleFunction) -> tuple[Tensor, list[int]]:
    """Samples to evaluate together, and the rows of those to evaluate also alone.

    First, last, and those with the smallest and the largest sum: where a condition on the batch
    falls out differently for some samples, it is likely to do so for these. A single sample gets
    invented neighbours before and after it, if the model takes any.
    """
    x = problem.x.detach()
    if len(x) > 1:
        sums = x.reshape(len(x), -1).sum(1)
        chosen = list(dict.fromkeys([0, len(x) - 1, int(sums.argmin()), int(sums.argmax())]))
        return x[chosen], list(range(len(chosen)))
    flipped = x.reshape(len(x), -1).flip(1).reshape(x.shape)
    for neighbour in (-4 * x, flipped):
        company = torch.cat([neighbour, x, flipped, flipped])  # x is not in the middle
        try:
            values_of(problem.function, company)
        except Exception:  # user code, on a point that nobody gave: nothing follows from an error
            continue
        return company, [1]
    return x, [0]


def _outputs(function: Function, x: Tensor, name: str) -> Tensor:
    try:
        return values_of(function, x)
    except MemoryError:
        raise
    except Exception as error:  # user code runs here: anything may come out
        lines = str(error).strip().splitlines() or [""]
        many, few = (
            ("several samples", "one alone") if len(x) == 1 else ("two samples", str(len(x)))
        )
        raise ArgumentError(
            f"{name} can be evaluated on {many} together and not on {few} "
            f"({type(error).__name__}: {lines[0]}), so its outputs depend on the batch. {_MIXES}; "
            "squeeze and reshape must keep dimension 0."
        ) from error


def _unexplained(
    measure: Measure, gaps: Gaps, problem: SampleFunction, x: Tensor, other: Other
) -> float | None:
    """The largest difference that rounding does not explain, None if it explains all.

    Args:
        measure: what should differ by rounding alone.
        gaps: what it gave for `problem` and `x`.
        problem: the model.
        x: the samples that are compared.
        other: the model in the other precision.
    """
    again = other()
    if again is not None:
        x_again = x.to(again.x.dtype)
        wide, samples = (problem, x) if x.dtype == torch.float64 else (again, x_again)
        with Roundings(torch.float64) as roundings:
            values_of(wide.function, samples)
        if roundings.eps == torch.finfo(torch.float64).eps:
            others = measure(again.function, x_again)
            single, double = (gaps, others) if wide is again else (others, gaps)
            return beyond_rounding(single, double)
    with Roundings(x.dtype) as roundings:
        values_of(problem.function, x)
    return beyond_half_of_the_digits(gaps, roundings.eps)


def _generator_state(x: Tensor) -> Tensor:
    return torch.cuda.get_rng_state(x.device) if x.is_cuda else torch.get_rng_state()
