"""Samples one batch after the other: from tensors, a Dataset or a DataLoader."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lipfast.errors import ArgumentError
from lipfast.estimators.jacobian.function import check_inputs

Data = Tensor | tuple[Tensor, ...] | list[Tensor] | Dataset[object] | DataLoader[object]
BATCH = 1024


def count_samples(data: Data) -> int | None:
    """How many samples there are, if the data say so."""
    if isinstance(data, Tensor):
        return len(data) if data.dim() else None
    if isinstance(data, (tuple, list)):
        return None
    try:
        return len(data.dataset if isinstance(data, DataLoader) else data)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError):
        return None


def sample_batches(data: Data) -> Iterator[tuple[Tensor, ...]]:
    """Checked batches: a tuple with one tensor (b, D...) per input of the model.

    Args:
        data: a tensor (B, D...); a tuple of tensors for a model with several inputs; a Dataset, or
            a DataLoader, whose entries are tensors or tuples with the samples first (labels and
            whatever follows are ignored).

    Raises:
        ArgumentError: something else, no samples, or batches that do not go together.
        NonFiniteError: a sample holds NaN or Inf; says which, counted from the first batch.
    """
    first, shapes = 0, None
    for inputs in _batches(data):
        checked = check_inputs(inputs, first)
        found = [(tuple(value.shape[1:]), value.dtype) for value in checked]
        if shapes is not None and found != shapes:
            raise ArgumentError(
                f"the batch from sample {first} on holds {found}, the ones before it {shapes}: all "
                "samples must be alike"
            )
        shapes = found
        first += len(checked[0])
        yield checked
    if first == 0:
        raise ArgumentError("there are no samples: the data hold no batch")


def _batches(data: Data) -> Iterator[Tensor | tuple[Tensor, ...]]:
    if isinstance(data, Tensor):
        yield from torch.split(data, BATCH) if data.dim() else (data,)
    elif isinstance(data, (tuple, list)):
        check_inputs(data)
        yield from zip(*(torch.split(value, BATCH) for value in data), strict=True)
    elif isinstance(data, (DataLoader, Dataset)):
        loader: Iterable[object] = (
            data if isinstance(data, DataLoader) else DataLoader(data, batch_size=BATCH)
        )
        for batch in loader:
            yield _samples_of(batch)
    else:
        raise ArgumentError(
            "data must be a tensor of samples, a tuple of tensors (one per input of the model), a "
            f"Dataset or a DataLoader, not {type(data).__name__} (torch.from_numpy for an array)"
        )


def _samples_of(batch: object) -> Tensor:
    """The samples of a loader's batch; labels follow them."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch
    keys = f" with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
    raise ArgumentError(
        f"a batch of the data is a {type(batch).__name__}{keys}: expected a tensor, or a tuple "
        "whose first entry is one (wrap the Dataset, or give a collate_fn)"
    )
