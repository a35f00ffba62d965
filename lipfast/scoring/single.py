"""Bound one checkpoint, without a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lipfast.checkpoints import Checkpoint, find_checkpoints, read_checkpoint
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.source import Archive
from lipfast.errors import ArgumentError, NonFiniteError, StateDictError
from lipfast.estimators.results import Bounds, UpperBound
from lipfast.norms import AnyNorm
from lipfast.scoring.architectures import ArchArguments, ArchSource, ModelFamily
from lipfast.scoring.data import DataSource, load_data
from lipfast.scoring.device import find_device
from lipfast.scoring.fit import fitted


def bound_checkpoint(
    path: Archive,
    *,
    arch: ArchSource,
    data: DataSource | None = None,
    arch_args: Mapping[str, Scalar] | None = None,
    input_shape: Sequence[int] | None = None,
    prefix: str | None = None,
    norm: AnyNorm = 2,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Checkpoint, Bounds | UpperBound]:
    """Bound the Lipschitz constant of one checkpoint.

    Args:
        path: a `.safetensors`, `.pt` or `.pth` file, or its fsspec URL.
        arch: as for `score`.
        data: samples, as for `score`; without them only the upper bound is computed.
        arch_args: keyword arguments that go before the checkpoint's metadata.
        input_shape: shape of one sample, where there is no data; by default that of the first
            layer when it is linear.
        prefix: of the network in the file, as for `score`.
        norm: 1, 2 or inf.
        seed: seed of the start vectors.
        device: where bounds are computed, as for `score`.

    Returns:
        The checkpoint with its note, and its bounds; an `UpperBound` alone without data.

    Raises:
        LipfastError: as `score` raises, and where `score` makes a row with an error.
    """
    place = find_device(str(device))
    files = find_checkpoints(path)
    if len(files) > 1:
        raise ArgumentError(f"'{path}' holds {len(files)} checkpoints: use 'lipfast score'")
    checkpoint = read_checkpoint(files[0], prefix=prefix)
    architecture = ModelFamily(arch, arch_args)
    with _naming(files[0].uri):
        arguments = architecture.arguments(checkpoint.metadata.values)
    x = _blank_samples(architecture, arguments, input_shape) if data is None else load_data(data).x
    plan = architecture.plan(arguments, x)
    with _naming(files[0].uri):
        checkpoint = fitted(checkpoint, plan, prefix)
        plan.check(checkpoint.state_dict)
    weights = {name: place.take(tensor) for name, tensor in checkpoint.state_dict.items()}
    if data is None:
        return checkpoint, plan.upper(weights, norm=norm, seed=seed)
    return checkpoint, plan.bounds(weights, place.take(x.to(plan.dtype)), norm=norm, seed=seed)


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Errors about a checkpoint's content say which file."""
    try:
        yield
    except (ArgumentError, StateDictError, NonFiniteError) as error:
        raise type(error)(f"{uri}: {error}") from error


def _blank_samples(
    architecture: ModelFamily, arguments: ArchArguments, shape: Sequence[int] | None
) -> Tensor:
    shape = shape or architecture.input_shape
    if shape is None:
        for module in architecture.model(arguments).modules():
            if next(module.parameters(recurse=False), None) is not None:
                shape = (module.in_features,) if isinstance(module, nn.Linear) else None
                break
    if shape is None:
        raise ArgumentError(
            f"the shape of a sample for '{architecture.name}' is not known: give --data, or "
            "--input-shape such as 3,32,32"
        )
    return torch.zeros(2, *shape)
