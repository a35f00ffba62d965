"""Bring the weights of batches to a device while the batch before is bounded.

A batch is packed into one pinned buffer by a thread of its own, (networks, *shape) for each
parameter, goes to the device in one copy on a stream of its own, and is read there as views. So
three batches are on their way: one that is packed, one that is copied, one that is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipfast.plan.checked import StateDict
from lipfast.plan.stacked import StackedStateDicts

_GRANULE = 256  # bytes, as of torch's own tensors on a device
_BUFFERS = 3  # one is packed, one is copied, one may still be in use when the next is asked for


@dataclass(frozen=True)
class Region:
    """Where a parameter of all networks lies in a buffer.

    Attributes:
        start: first byte.
        size: bytes.
        dtype: of its numbers.
        shape: (networks, *shape).
    """

    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def of(self, buffer: Tensor) -> Tensor:
        """The parameter, a view of the buffer."""
        return buffer[self.start : self.start + self.size].view(self.dtype).view(self.shape)


class UnlikeError(Exception):
    """State dicts of a batch have other names, dtypes or shapes than its first one."""


def regions_of(first: StateDict, count: int) -> dict[str, Region] | None:
    """Regions for so many state dicts like the first one; None where it has to go by itself."""
    regions, start = {}, 0
    for name, tensor in first.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return None
        size = count * tensor.numel() * tensor.element_size()
        regions[name] = Region(start, size, tensor.dtype, (count, *tensor.shape))
        start += math.ceil(size / _GRANULE) * _GRANULE
    return regions


@dataclass
class PinnedBuffer:
    """Pinned memory that is used again and again.

    Attributes:
        memory: bytes.
        copied: when the last copy out of it is over.
    """

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))
    copied: Any = None

    def take(self, size: int) -> Tensor:
        """So many bytes of it, once nothing reads them any more."""
        if self.copied is not None and not self.copied.query():
            self.copied.synchronize()
        if len(self.memory) < size:
            self.memory = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self.memory[:size]


@dataclass(frozen=True)
class Packing:
    """A batch that is being packed.

    Attributes:
        regions: of its parameters.
        buffer: whose memory holds them.
        packed: the bytes, soon.
    """

    regions: Mapping[str, Region]
    buffer: PinnedBuffer
    packed: Future[Tensor]


@dataclass(frozen=True)
class Sent:
    """A batch on its way to the device.

    Attributes:
        regions: of its parameters.
        memory: bytes on the device.
        arrived: when they are there.
    """

    regions: Mapping[str, Region]
    memory: Tensor
    arrived: Any

    def state_dicts(self) -> StackedStateDicts:
        """The state dicts on the device; what is queued from now on waits for them there."""
        torch.cuda.current_stream(self.memory.device).wait_event(self.arrived)
        return StackedStateDicts(
            {name: region.of(self.memory) for name, region in self.regions.items()}
        )


class Feed:
    """Packs batches and sends them to a device.

    Args:
        place: the device.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream: Any = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
        self._buffers = [PinnedBuffer() for _ in range(_BUFFERS)]
        self._next = 0
        self._pool = ThreadPoolExecutor(1, "lipfast-pack")

    def pack(self, state_dicts: Sequence[StateDict]) -> Packing | None:
        """Begin to pack a batch; None where it cannot be."""
        regions = regions_of(state_dicts[0], len(state_dicts))
        if not regions:
            return None
        last = list(regions.values())[-1]
        buffer = self._buffers[self._next]
        self._next = (self._next + 1) % _BUFFERS
        memory = buffer.take(last.start + last.size)
        packed = self._pool.submit(_packed, memory, regions, state_dicts)
        return Packing(regions, buffer, packed)

    def send(self, packing: Packing) -> Sent:
        """Queue the copy of a batch, once it is packed.

        Raises:
            UnlikeError: its state dicts are not alike.
            torch.OutOfMemoryError: the device has no memory for it.
        """
        memory = packing.packed.result()
        # What the copy may overwrite was used by calls that are queued before it.
        self._stream.wait_stream(torch.cuda.current_stream(self._place))
        with torch.cuda.stream(self._stream):
            there = memory.to(self._place, non_blocking=True)
            arrived = self._stream.record_event()
        packing.buffer.copied = arrived
        return Sent(packing.regions, there, arrived)

    def close(self) -> None:
        """End the thread that packs."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _packed(
    memory: Tensor, regions: Mapping[str, Region], state_dicts: Sequence[StateDict]
) -> Tensor:
    """Copy all parameters to where they belong.

    Raises:
        UnlikeError: a state dict is not as the first one.
    """
    if any(entry.keys() != regions.keys() for entry in state_dicts):
        raise UnlikeError("names differ")
    for name, region in regions.items():
        tensors = [entry[name].detach() for entry in state_dicts]
        own = (region.dtype, region.shape[1:], torch.strided)
        if any((tensor.dtype, tensor.shape, tensor.layout) != own for tensor in tensors):
            raise UnlikeError(f"dtypes or shapes of '{name}' differ")
        torch.stack(tensors, out=region.of(memory))
    return memory
