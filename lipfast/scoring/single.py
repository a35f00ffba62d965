"""Bound one checkpoint, or check its certificate, without a store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lipfast.checkpoints import Checkpoint, find_checkpoints, read_checkpoint
from lipfast.checkpoints.metadata import Scalar
from lipfast.checkpoints.source import Archive
from lipfast.errors import ArgumentError, CertificateError, NonFiniteError, StateDictError
from lipfast.estimators.floor.found import floors
from lipfast.estimators.options import UpperMethod, check_method
from lipfast.estimators.plan import Plan
from lipfast.estimators.results import Bounds, UpperBound
from lipfast.estimators.upper.quadratic.bounds import QUADRATIC
from lipfast.estimators.upper.quadratic.certificate import QuadraticCertificate
from lipfast.estimators.upper.quadratic.verify import verify_certificate
from lipfast.norms import AnyNorm, check_norm
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
    method: UpperMethod = "product",
    effort: int = 2,
    certificate: str | os.PathLike[str] | None = None,
    floor: bool = False,
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
        method: of the upper bound, as for `Plan.upper`.
        effort: of its search, and of the floor's.
        certificate: file to write `UpperBound.certificate` into, for `check_certificate`.
        floor: also search for what no bound that ignores reachability can be below.

    Returns:
        The checkpoint with its note, and its bounds; an `UpperBound` alone without data.

    Raises:
        LipfastError: as `score` raises, and where `score` makes a row with an error.
    """
    check_method(method, effort, check_norm(norm))
    if certificate is not None and method != "quadratic":
        raise ArgumentError("a certificate is of method 'quadratic': add --method quadratic")
    place = find_device(str(device))
    x = None if data is None else load_data(data).x
    checkpoint, plan = _read_fitting(path, ModelFamily(arch, arch_args), x, input_shape, prefix)
    weights = {name: place.take(tensor) for name, tensor in checkpoint.state_dict.items()}
    found: Bounds | UpperBound
    if x is None:
        found = plan.upper(weights, norm=norm, seed=seed, method=method, effort=effort)
        if floor:
            own, of = [plan.resolve(weights)], check_norm(norm)
            (below,) = floors(plan, own, norm=of, effort=effort, seed=seed)
            found = replace(found, floor=below)
    else:
        samples = place.take(x.to(plan.dtype))
        found = plan.bounds(
            weights, samples, norm=norm, seed=seed, method=method, effort=effort, floor=floor
        )
    if certificate is not None:
        upper = found.upper if isinstance(found, Bounds) else found
        if upper.certificate is None:
            why = upper.reason or f"the smaller bound is by the {upper.method}"
            if upper.method == QUADRATIC:
                why = "only chains of linear layers and activations have one, and this is none"
            raise ArgumentError(f"there is no certificate to write: {why}")
        upper.certificate.made_for(plan, weights).save(certificate)
    return checkpoint, found


def check_certificate(
    certificate: str | os.PathLike[str],
    path: Archive,
    *,
    arch: ArchSource,
    arch_args: Mapping[str, Scalar] | None = None,
    input_shape: Sequence[int] | None = None,
    prefix: str | None = None,
) -> tuple[Checkpoint, UpperBound | CertificateError]:
    """Prove the bound of a checkpoint again by a certificate file; see `verify_certificate`.

    Args:
        certificate: what `QuadraticCertificate.save` wrote.
        path: the checkpoint, as for `bound_checkpoint`.
        arch: as for `score`.
        arch_args: keyword arguments that go before the checkpoint's metadata.
        input_shape: shape of one sample; by default that of the first layer when it is linear.
        prefix: of the network in the file, as for `score`.

    Returns:
        The checkpoint, and its bound, or why the certificate proves none.

    Raises:
        CertificateError: the file is no certificate.
        LipfastError: as `bound_checkpoint` raises.
    """
    read = QuadraticCertificate.load(certificate)
    checkpoint, plan = _read_fitting(path, ModelFamily(arch, arch_args), None, input_shape, prefix)
    try:
        return checkpoint, verify_certificate(read, plan, checkpoint.state_dict)
    except CertificateError as error:
        return checkpoint, error


def _read_fitting(
    path: Archive,
    architecture: ModelFamily,
    x: Tensor | None,
    input_shape: Sequence[int] | None,
    prefix: str | None,
) -> tuple[Checkpoint, Plan]:
    """One checkpoint that fits its architecture."""
    files = find_checkpoints(path)
    if len(files) > 1:
        raise ArgumentError(f"'{path}' holds {len(files)} checkpoints: use 'lipfast score'")
    checkpoint = read_checkpoint(files[0], prefix=prefix)
    with _naming(files[0].uri):
        arguments = architecture.arguments(checkpoint.metadata.values)
    if x is None:
        x = _blank_samples(architecture, arguments, input_shape)
    plan = architecture.plan(arguments, x)
    with _naming(files[0].uri):
        checkpoint = fitted(checkpoint, plan, prefix)
        plan.check(checkpoint.state_dict)
    return checkpoint, plan


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
