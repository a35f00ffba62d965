"""Numbers that come from a device, or go to one, without a wait of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def sent(numbers: Sequence[Any] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device, which it does not wait for: they are in pinned memory.

    Example:
        >>> sent([[1, 2], [3, 4]], torch.device("cpu"))
        tensor([[1, 2],
                [3, 4]])
    """
    made = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, device="cpu")
    if device.type != "cuda" or not made.is_cpu:
        return made.to(device)
    return made.pin_memory().to(device, non_blocking=True)


class Fetched:
    """Tensors on their way to the host, which waits for them only if nothing else has waited.

    Those of one dtype are copied in one piece, into pinned memory, so that queueing a copy does not
    wait. Whoever has waited for what was queued later has waited for these.

    Args:
        tensors: of any shapes, all on one device or all on the CPU.

    Example:
        >>> import torch
        >>> Fetched([torch.ones(2), torch.tensor(True)]).read()
        [tensor([1., 1.]), tensor(True)]
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        tensors = [tensor.detach() for tensor in tensors]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for index, tensor in enumerate(tensors):
            by_dtype.setdefault(tensor.dtype, []).append(index)
        self._shapes = [tensor.shape for tensor in tensors]
        self._pieces: list[tuple[list[int], Tensor]] = []
        self._arrived: Any = None
        for indices in by_dtype.values():
            flat = [tensors[index].reshape(-1) for index in indices]
            together = flat[0] if len(flat) == 1 else torch.cat(flat)
            self._pieces.append((indices, together.to("cpu", non_blocking=True)))
        if tensors and not tensors[0].is_cpu:
            self._arrived = torch.cuda.current_stream(tensors[0].device).record_event()

    def read(self) -> list[Tensor]:
        """The tensors, on the CPU."""
        if self._arrived is not None and not self._arrived.query():
            self._arrived.synchronize()
        found = [torch.empty(0)] * len(self._shapes)
        for indices, together in self._pieces:
            sizes = [self._shapes[index].numel() for index in indices]
            for index, piece in zip(indices, torch.split(together, sizes), strict=True):
                found[index] = piece.reshape(self._shapes[index])
        return found
