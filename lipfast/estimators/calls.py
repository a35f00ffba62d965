"""The public calls: trace a model, and bound its Lipschitz constant from both sides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

from torch import Tensor, nn
from torch.export import ExportedProgram

from lipfast.errors import ArgumentError
from lipfast.estimators.both_bounds import bounds_from
from lipfast.estimators.domain import Domain
from lipfast.estimators.jacobian.input_gradient import input_gradient_norms
from lipfast.estimators.jacobian.norms import jacobian_norms
from lipfast.estimators.lower.stream import lower_bound
from lipfast.estimators.options import UpperMethod, check_options, refuse
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import Bounds, UpperBound
from lipfast.estimators.samples import Data, example_of, read_samples
from lipfast.norms import AnyNorm
from lipfast.plan.modules import lock_of, unwrap
from lipfast.plan.trace import Source, require_module, trace

__all__ = [
    "bounds",
    "compile",
    "input_gradient_norms",
    "jacobian_norms",
    "lower_bound",
    "upper_bound",
]


def compile(  # noqa: A001 (the name that torch users know)
    model: Source, example_input: Tensor | Sequence[Tensor] | None = None
) -> Plan:
    """Trace an architecture once, for any number of state dicts.

    The model is traced in eval mode with any number of samples and left as it was found (mode of
    every submodule, requires_grad, hooks, random number generators).

    Args:
        model: a module (also inside DataParallel or `torch.compile`), a
            `torch.export.ExportedProgram`, or the path of a ``.pt2`` file.
        example_input: a tensor (B, D...) whose first dimension is the sample; a tuple of tensors
            for a model with several inputs; not needed for an exported program.

    Returns:
        A `Plan`: no weights, only names.

    Raises:
        ArgumentError: integer inputs (token ids have no Lipschitz constant), or no samples; a
            weight that the model computed before and keeps stands in the place of its parameter.
        TraceError: `torch.export` cannot trace the model; says where, and what to do.
        UnsupportedOpError: ops without a rule: all of them are listed.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(40, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10)
        ... )
        >>> plan = lipfast.compile(model, torch.zeros(2, 40))
        >>> [(layer.name, layer.kind, layer.shape) for layer in plan.layers]
        [('0', 'linear', (16, 40)), ('2', 'linear', (10, 16))]
    """
    return Plan.trace(model, example_input)


def upper_bound(
    model: nn.Module,
    example_input: Data | Sequence[Tensor],
    *,
    norm: AnyNorm = 2,
    domain: Domain | None = None,
    rtol: float = 1e-6,
    method: UpperMethod = "product",
    effort: int = 2,
    memory: int = 1 << 30,
    progress: bool | None = None,
    **_elsewhere: NoReturn,
) -> UpperBound:
    """Certified upper bound on the Lipschitz constant of a model.

    ``||f(x) - f(y)|| <= L ||x - y||`` for all x, y, in eval mode; L is a product of certified
    operator norms and constants of activations, rounded up (Szegedy et al., 2014), or a smaller
    number: in norms 1 and inf the interval Jacobian, with ``method="quadratic"`` quadratic
    constraints on slopes (Fazlyab et al., 2019). `UpperBound.method` says which.

    Args:
        model: left as it is found.
        example_input: a tensor (B, D...), a tuple of tensors for several inputs, or a Dataset or
            DataLoader, of which the first batch is read; only shapes and dtypes matter.
        norm: 1, 2 or inf, of inputs and outputs alike.
        domain: `lipfast.Box` or `lipfast.Ball`: the bound holds for inputs in this set. Products of
            activations have no finite constant without one, unless a normalisation bounds them.
            On the CPU slopes that activations cannot have there make bounds smaller, see
            `Plan.upper`.
        rtol: relative gap of the bracket of each layer's norm, where that is over all input sizes
            for a convolution, and never below 1e-3. For wide convolutions 1e-2 takes a fraction of
            the time.
        method: "quadratic" also bounds by quadratic constraints where it can (norm 2, or any with a
            domain), and takes the smaller bound, see `Plan.upper`.
        effort: of its search, 1, 2 or 3.
        memory: bytes that the matrices of `method="quadratic"` may take, see `Plan.upper`; a
            product of norms takes what the sizes of the layers ask for, whatever it is.
        progress: None shows it on a terminal after two seconds, False never, True from the start
            and everywhere (where stderr is no terminal, as one line when a step is done).

    Returns:
        An `UpperBound` with the brackets of the layers: ``print`` shows them as a table, and
        `UpperBound.explain` how they are composed.

    Raises:
        ArgumentError: an option does not fit, or has no meaning here; says where it has one.
        ArgumentError, TraceError, UnsupportedOpError: see `compile`.
        NonFiniteError: a weight is NaN or infinite.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sigmoid())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> estimate = lipfast.upper_bound(model, torch.zeros(1, 2))
        >>> round(float(estimate), 6), estimate.certified
        (1.0, True)
    """
    refuse("upper_bound", _elsewhere)
    check_options(norm, domain, memory, progress)
    plan = Plan.of(trace(model, example_of(example_input)))
    return plan.upper(
        _state_dict(model),
        norm=norm,
        domain=domain,
        rtol=rtol,
        method=method,
        effort=effort,
        memory=memory,
        progress=progress,
    )


def bounds(
    model: nn.Module,
    data: Data,
    *,
    norm: AnyNorm = 2,
    per_sample: bool = False,
    memory: int = 1 << 30,
    domain: Domain | None = None,
    rtol: float = 1e-6,
    method: UpperMethod = "product",
    effort: int = 2,
    floor: bool = False,
    progress: bool | None = None,
    **_elsewhere: NoReturn,
) -> Bounds:
    """Lower and upper bound on the Lipschitz constant of a model, both certified.

    Args:
        model: left as it is found.
        data: samples for the lower bound: whatever `lower_bound` takes. Of a model with several
            inputs the lower bound is not certified.
        norm: 1, 2 or inf.
        per_sample: keep the Jacobian norm of every sample.
        memory: bytes that intermediate tensors may take, and matrices as in `upper_bound`.
        domain: the bounds hold for inputs in this set, see `upper_bound` and `lower_bound`.
        rtol: relative gap of the bracket of each layer's norm, see `upper_bound`.
        method: of the upper bound, see `upper_bound`.
        effort: see `upper_bound`; of the floor's search too.
        floor: also search for the largest norm of a Jacobian whose slopes each activation may
            have, `Bounds.floor` (see `lipfast.estimators.floor.result.Floor`): no bound that
            ignores reachability can be below, for all inputs whatever the domain. It says how much
            of the gap is left to better upper bounds of that kind, and is no bound of the Lipschitz
            constant itself.
        progress: see `upper_bound`.

    Returns:
        `Bounds`: `.lower`, `.upper`, `.mean`, `.rms`, `.layers`; printing it shows a table, and
        `.explain()` how the upper bound is composed.

    Raises:
        ArgumentError: an option does not fit, or has no meaning here; says where it has one.
        ArgumentError, TraceError, UnsupportedOpError: see `compile`.
        NonFiniteError: a weight or a sample is NaN or infinite.

    Examples:
        >>> import torch, lipfast
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU(), torch.nn.Linear(2, 1)
        ... )
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        >>> _ = model[2].weight.data.copy_(torch.tensor([[2.0, 0.0]]))
        >>> result = lipfast.bounds(model, torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
        >>> round(result.lower.value, 4), round(result.upper.value, 4), result.mean
        (6.0, 8.0, 3.0)
        >>> loader = torch.utils.data.DataLoader(torch.tensor([[1.0, 1.0], [-1.0, 1.0]]))
        >>> lipfast.bounds(model, loader) == result
        True
        >>> lipfast.bounds(model, loader, floor=True).floor
        Floor(6, l2, certified: no bound that ignores reachability can be below)
    """
    refuse("bounds", _elsewhere)
    norm = check_options(norm, domain, memory, progress)
    state_dict = _state_dict(model)
    with read_samples(data, whole=True) as samples:
        plan = Plan.of(trace(model, [value[:2] for value in samples.first]))
        check_options(norm, domain, shapes=plan.input_shapes)
        (result,) = bounds_from(
            plan,
            state_dict,
            samples,
            norm=norm,
            rtol=rtol,
            seed=0,
            method=method,
            effort=effort,
            floor=floor,
            per_sample=per_sample,
            memory=memory,
            domain=domain,
            progress=progress,
        )
    return result


def _state_dict(model: nn.Module) -> Mapping[str, Tensor]:
    if isinstance(model, (str, os.PathLike, ExportedProgram)):
        raise ArgumentError(
            f"model must be an nn.Module, not {type(model).__name__}; for an exported program use "
            "lipfast.compile and give the state dict to the plan"
        )
    module = unwrap(require_module(model))
    with lock_of(module):
        found: Mapping[str, Tensor] = module.state_dict()
    return found
