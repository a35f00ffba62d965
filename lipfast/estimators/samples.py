"""Samples one batch after the other: from tensors, a Dataset or a DataLoader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipfast.errors import ArgumentError, LipfastError, NonFiniteError
from lipfast.ops._arguments import check_device
from lipfast.plan.export import check_floating_input
from lipfast.text import kind_and_first_line

Data = Tensor | tuple[Tensor, ...] | list[Tensor] | Dataset[object] | DataLoader[object]
BATCH = 1024


class SampleStream:
    """Batches that are read once, with the first of them at hand; see `read_samples`.

    Attributes:
        first: the first batch, one tensor (b, D...) per input of the model.
        count: how many samples there are, None where the data do not say so.
        unread: whether nobody has looked yet whether the only batch holds finite numbers; see
            `check_inputs`.
    """

    def __init__(
        self, batches: Iterator[tuple[Tensor, ...]], count: int | None, *, unread: bool = False
    ) -> None:
        self.first = next(batches)
        self.count = count
        self.unread = unread
        self._others = batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield self.first
        yield from self._others


@contextmanager
def read_samples(
    data: Data,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    whole: bool = False,
    later: bool = False,
) -> Iterator[SampleStream]:
    """Read data once; afterwards torch's random generator is as before.

    Args:
        data: see `sample_batches`, as `shapes` and `whole`.
        shapes: what the samples must be like.
        whole: take tensors as one batch.
        later: leave it to the caller whether tensors on a device hold finite numbers, which waits
            for the device.

    Raises:
        ArgumentError, NonFiniteError: see `sample_batches`.
    """
    given = data if isinstance(data, (tuple, list)) else (data,)
    unread = later and all(isinstance(value, Tensor) and value.is_cuda for value in given)
    batches = sample_batches(data, shapes=shapes, whole=whole, look=not unread)
    # Loaders draw from the global generator, shuffled or not.
    with torch.random.fork_rng(devices=[]):
        yield SampleStream(batches, _sample_count(data), unread=unread)


def example_of(data: Data | Sequence[Tensor]) -> Tensor | Sequence[Tensor]:
    """What a model can be traced with: tensors as they are, else the first batch."""
    if not isinstance(data, (Dataset, DataLoader)):
        return data
    with read_samples(data) as samples:
        return samples.first


def _sample_count(data: Data) -> int | None:
    """How many samples there are, if the data say so."""
    counted: object = data
    if isinstance(data, (tuple, list)):
        counted = data[0] if data else None
    elif isinstance(data, DataLoader):
        counted = data.dataset
    try:
        return len(counted)  # type: ignore[arg-type]
    except (TypeError, RuntimeError, AttributeError):
        return None


def sample_batches(
    data: Data,
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    whole: bool = False,
    look: bool = True,
) -> Iterator[tuple[Tensor, ...]]:
    """Checked batches: a tuple with one tensor (b, D...) per input of the model.

    Args:
        data: a tensor (B, D...); a tuple of tensors for a model with several inputs; a Dataset, or
            a DataLoader, whose entries are samples, or tuples with the samples first (labels and
            whatever follows are ignored). The samples of a model with several inputs are a tuple
            again, as in ``((x, y), label)``.
        shapes: of a sample of each input, where they are known.
        whole: take tensors as one batch.
        look: whether numbers are finite.

    Raises:
        ArgumentError: something else, no samples, or batches that do not go together.
        NonFiniteError: a sample holds NaN or Inf; says which, counted from the first batch.
    """
    first, alike = 0, None
    for inputs in _batches(data, whole=whole):
        checked = check_inputs(inputs, first, shapes, look=look)
        found = [(tuple(value.shape[1:]), value.dtype) for value in checked]
        if alike is not None and found != alike:
            raise ArgumentError(
                f"the batch from sample {first} on holds {found}, the ones before it {alike}: all "
                "samples must be alike"
            )
        alike = found
        first += len(checked[0])
        yield checked
    if first == 0:
        raise ArgumentError("there are no samples: the data hold no batch")


def _batches(data: Data, *, whole: bool) -> Iterator[Tensor | tuple[Tensor, ...]]:
    if isinstance(data, Tensor):
        check_floating_input(data)
        yield from (data,) if whole or not data.dim() else torch.split(data, BATCH)
    elif isinstance(data, (tuple, list)):
        if whole:
            yield tuple(data)
        else:
            check_inputs(data)
            yield from zip(*(torch.split(value, BATCH) for value in data), strict=True)
    elif isinstance(data, (DataLoader, Dataset)):
        loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=BATCH)
        yield from map(_samples_of, _read(loader))
    else:
        raise ArgumentError(
            "data must be a tensor of samples, a tuple of tensors (one per input of the model), a "
            f"Dataset or a DataLoader, not {type(data).__name__} (torch.from_numpy for an array)"
        )


def _read(loader: DataLoader[object]) -> Iterator[object]:
    """What a loader gives.

    Raises:
        ArgumentError: it fails, or its samples cannot be put together.
    """
    try:
        yield from loader
    except (LipfastError, MemoryError):
        raise
    except Exception as error:  # user code runs here: anything may come out
        raise ArgumentError(
            f"the data cannot be read ({kind_and_first_line(error)}): mend the Dataset; samples of "
            "several shapes need a collate_fn that brings them to one"
        ) from error


def _samples_of(batch: object) -> Tensor | tuple[Tensor, ...]:
    """The samples of a loader's batch; labels follow them."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, (tuple, list)) and all(isinstance(value, Tensor) for value in batch):
        return tuple(batch)
    keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise ArgumentError(
        f"a batch of the data is a {type(batch).__name__}{keys}: expected a tensor, or a tuple "
        "whose first entry is one (wrap the Dataset, or give a collate_fn)"
    )


def check_inputs(
    x: object,
    first: int = 0,
    shapes: Sequence[tuple[int, ...]] | None = None,
    *,
    look: bool = True,
) -> tuple[Tensor, ...]:
    """One tensor of samples, or several for a model with several inputs, checked; not detached.

    Args:
        x: what was given.
        first: index of the first sample.
        shapes: of a sample of each input, where they are known.
        look: whether numbers are finite.

    Raises:
        ArgumentError, NonFiniteError: see `check_samples`; or the inputs differ in their samples,
            or are not as many as the model takes.
    """
    values = tuple(x) if isinstance(x, (tuple, list)) else (x,)
    if not values:
        raise ArgumentError("there are no inputs: give a tensor of samples")
    if shapes is not None and len(values) != len(shapes):
        raise ArgumentError(
            f"the model has {len(shapes)} inputs and the data {len(values)}: give a tuple with one "
            "tensor of samples per input"
        )
    expected = [None] * len(values) if shapes is None else shapes
    if not isinstance(x, (tuple, list)):
        return (check_samples(x, expected[0], first, look=look),)
    checked = [
        _check_input(position, value, shape, first, look=look)
        for position, (value, shape) in enumerate(zip(values, expected, strict=True))
    ]
    counts = [value.shape[0] for value in checked]
    if len(set(counts)) > 1:
        raise ArgumentError(f"the inputs have {counts} samples: the first dimensions must agree")
    for value in checked[1:]:
        if value.device != checked[0].device:
            raise ArgumentError(
                f"the inputs are on {checked[0].device} and {value.device}: all must be on one "
                f"device (tensor.to({str(checked[0].device)!r}))"
            )
    return tuple(checked)


def _check_input(
    position: int, value: object, shape: tuple[int, ...] | None, first: int, *, look: bool
) -> Tensor:
    try:
        return check_samples(value, shape, first, look=look)
    except (ArgumentError, NonFiniteError) as error:
        raise type(error)(f"input {position}: {error}") from error


def check_samples(
    x: object, shape: tuple[int, ...] | None, first: int = 0, *, look: bool = True
) -> Tensor:
    """Check samples (B, *shape): floating, finite, at least one; `first` is the first one's index.

    Raises:
        ArgumentError: not a tensor, not floating, of the wrong shape, empty, or on a device without
            kernels.
        NonFiniteError: a sample holds NaN or Inf; says which.
    """
    if not isinstance(x, Tensor):
        raise ArgumentError(
            f"samples must be a tensor, not {type(x).__name__} (torch.from_numpy for an array)"
        )
    check_floating_input(x)
    if (shape is not None and tuple(x.shape[1:]) != shape) or x.dim() == 0:
        wanted = ", ".join(["samples", *(str(size) for size in shape or ())])
        raise ArgumentError(
            f"samples have shape {tuple(x.shape)}; expected ({wanted}): the first dimension is the "
            "sample, the others are what the architecture was traced with"
        )
    if x.shape[0] == 0:
        raise ArgumentError("there are no samples: the first dimension of the data is 0")
    if x.is_meta:
        raise ArgumentError("the samples hold no data (device meta): give real ones")
    if x.numel() == 0:
        raise ArgumentError(f"samples of shape {tuple(x.shape)} hold no numbers")
    if not x.is_cpu:
        check_device(x.device, "the samples are")
    if look:
        require_finite_samples(x, first)
    return x


def require_finite_samples(x: Tensor, first: int = 0) -> None:
    """Check that samples (B, *shape) hold finite numbers; `first` is the first one's index.

    Raises:
        NonFiniteError: a sample holds NaN or Inf; says which.
    """
    # One cheap reduction; a sum of finite numbers may overflow, so only then look closely.
    if not math.isfinite(x.detach().sum().item()) and not bool(torch.isfinite(x).all()):
        finite = torch.isfinite(x.reshape(x.shape[0], -1)).all(1)
        bad = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{len(bad)} of {x.shape[0]} samples hold NaN or Inf; "
            f"the first is sample {first + bad[0]}"
        )
