"""Trace an architecture with `torch.export` into a graph that holds no weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from lipfast.errors import ArgumentError, TraceError
from lipfast.plan.architecture import Architecture
from lipfast.plan.cached_weights import require_fresh
from lipfast.plan.conditions import buffers_known
from lipfast.plan.convert import convert
from lipfast.plan.evaluated import require_evaluates
from lipfast.plan.export import constants_read, example_inputs, exported, load_program
from lipfast.plan.fidelity import require_faithful
from lipfast.plan.modules import lock_of, unwrap

Source = nn.Module | ExportedProgram | str | os.PathLike[str]


def trace(
    model: Source,
    example_input: Tensor | Sequence[Tensor] | None = None,
    *,
    fresh: str | None = None,
) -> Architecture:
    """Trace a model in eval mode, with any number of samples.

    A module is compared with its graph on several batches, see `plan.fidelity`; of an exported
    program the graph is all there is.

    Args:
        model: a module (may be wrapped in DataParallel or compiled), an `ExportedProgram`, or the
            path of a ``.pt2`` file.
        example_input: a tensor whose first dimension is the sample, or a tuple of such tensors for
            a model with several inputs; not needed for an exported program.
        fresh: name of a module whose plan is for other state dicts, too: none of its numbers may
            stand in the place of parameters, see `plan.cached_weights`.

    Returns:
        The simplified graph, in which every node has a rule. Where the model decides by the values
        of buffers, they are among the constants, and every state dict must hold the same.

    Raises:
        ArgumentError: the example input is missing, not floating, or has no sample dimension; what
            a wrapper does beside calling the module inside would be lost; or see `fresh`.
        TraceError: the model cannot be traced, was exported in training mode, or gives other
            numbers than its graph.
        UnsupportedOpError: it holds ops without a rule (all are listed).
    """
    if isinstance(model, (str, os.PathLike)):
        program = load_program(Path(model))
        return convert(program, program.state_dict)
    if isinstance(model, ExportedProgram):
        return convert(model, model.state_dict)
    module = unwrap(require_module(model))
    inputs = example_inputs(example_input)
    read: dict[str, Tensor] = {}
    answers: list[Any] | None = None

    def trace_again(copy: nn.Module, samples: tuple[Tensor, ...]) -> Architecture:
        return convert(exported(copy, samples), copy.state_dict(keep_vars=True))

    try:
        program = exported(module, inputs)
    except TraceError as error:
        if "DataDependent" not in type(error.__cause__).__name__:
            raise
        answers = []
        program = exported(module, inputs, partial(buffers_known, read, answers))
    with lock_of(module):
        state_dict = module.state_dict(keep_vars=True)
    try:
        architecture = convert(program, state_dict, read)
    except TraceError:
        require_evaluates(module, inputs)
        raise
    require_faithful(module, inputs, architecture, answers, trace_again)
    if fresh is not None:
        require_fresh(module, architecture, constants_read(program), fresh)
    return architecture


def require_module(model: object) -> nn.Module:
    """The model itself, if it is a module.

    Raises:
        ArgumentError: it is something else; says what to give instead.
    """
    if isinstance(model, nn.Module):
        return model
    what, advice = type(model).__name__, ""
    if isinstance(model, type):
        what, advice = f"the class {model.__name__}", ": give an instance of it"
    elif isinstance(model, Mapping):
        advice = ": give its architecture to lipfast.compile and the state dict to the plan"
    elif isinstance(model, Architecture):
        advice = ": its own methods take state dicts (plan.upper(state_dict))"
    elif isinstance(model, Tensor):
        advice = ": lipfast.spectral_norms takes matrices"
    elif callable(model):
        advice = (
            ": wrap it, as in class Model(nn.Module) with def forward(self, x): return f(x); "
            "what it learns must be parameters of the module"
        )
    raise ArgumentError(
        f"model must be an nn.Module, an ExportedProgram or the path of a .pt2 file, not {what}"
        f"{advice}"
    )
