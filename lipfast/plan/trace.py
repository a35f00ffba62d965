"""Trace an architecture with `torch.export` into a graph that holds no weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.export import ExportedProgram

from lipfast.errors import ArgumentError
from lipfast.plan.architecture import Architecture
from lipfast.plan.convert import convert
from lipfast.plan.export import example_inputs, exported, load_program
from lipfast.plan.modules import lock_of, unwrap

Source = nn.Module | ExportedProgram | str | os.PathLike[str]


def trace(model: Source, example_input: Tensor | Sequence[Tensor] | None = None) -> Architecture:
    """Trace a model in eval mode, with any number of samples.

    Args:
        model: a module (may be wrapped in DataParallel or compiled), an `ExportedProgram`, or the
            path of a ``.pt2`` file.
        example_input: a tensor whose first dimension is the sample, or a tuple of such tensors for
            a model with several inputs; not needed for an exported program.

    Returns:
        The simplified graph, in which every node has a rule.

    Raises:
        ArgumentError: the example input is missing, not floating, or has no sample dimension.
        TraceError: the model cannot be traced, or was exported in training mode.
        UnsupportedOpError: it holds ops without a rule (all are listed).
    """
    if isinstance(model, (str, os.PathLike)):
        program = load_program(Path(model))
        return convert(program, program.state_dict)
    if isinstance(model, ExportedProgram):
        return convert(model, model.state_dict)
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            "model must be an nn.Module, an ExportedProgram or the path of a .pt2 file, "
            f"not {type(model).__name__}"
        )
    module = unwrap(model)
    program = exported(module, example_inputs(example_input))
    with lock_of(module):
        state_dict = module.state_dict(keep_vars=True)
    return convert(program, state_dict)
