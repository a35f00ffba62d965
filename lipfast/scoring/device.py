"""The device that bounds are computed on: which, whether it can be used, whether it still can."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lipfast._native import cuda_info, cuda_reason, no_cuda_device
from lipfast.errors import ArgumentError, LipfastError
from lipfast.text import first_line

AUTO = "auto"
_EXPECTED = "expected cpu, cuda, cuda:1 (or another index) or auto"
# Shares of the device's free memory: what the bounds may take, and the weights of one batch.
_INTERMEDIATE, _WEIGHTS = 2, 8


class DeviceLostError(LipfastError):
    """A device failed and answers no more; what was scored before is kept."""


class DeviceMemoryError(LipfastError):
    """A checkpoint alone takes more memory than a device has."""


@dataclass(frozen=True)
class Device:
    """Where bounds are computed.

    Attributes:
        place: as torch names it.
        note: for the reader: its name, or why it was taken.
    """

    place: torch.device
    note: str

    @property
    def is_cpu(self) -> bool:
        """Whether it is the processor, whose memory the checkpoints are in already."""
        return self.place.type == "cpu"

    @property
    def batch_size(self) -> int:
        """Checkpoints of one plan per call where nobody asks for another number."""
        return 64 if self.is_cpu else 1024

    def memory(self, asked: int) -> int:
        """Bytes of intermediate results: those asked for, and no more than are there."""
        return asked if self.is_cpu else max(1, min(asked, self._free() // _INTERMEDIATE))

    def batch(self, most: int, size: int) -> int:
        """How many checkpoints of `size` bytes each go into a batch of at most so many."""
        if self.is_cpu:
            return most
        return max(1, min(most, self._free() // _WEIGHTS // max(1, size)))

    def check_alive(self, error: Exception) -> None:
        """Tell a failure of the device from one of a checkpoint, by asking the device.

        Raises:
            DeviceLostError: it does not answer.
        """
        if self.is_cpu:
            return
        try:
            alive = torch.ones(1, device=self.place).tolist() == [1.0]
        except Exception:
            alive = False
        if not alive:
            raise DeviceLostError(
                f"the device {self.place} was lost ({first_line(error)}). What was scored before "
                "is kept, and the same call goes on from there, on another --device as well"
            ) from error

    def too_small(self, uri: str, lacking: str) -> DeviceMemoryError:
        """The error of a checkpoint that does not fit alone."""
        return DeviceMemoryError(
            f"{uri}: takes more memory than {self.place} has ({self._free() >> 20} MiB are free; "
            f"{lacking}): use --device cpu, fewer samples, or less --memory"
        )

    def release(self) -> None:
        """Give memory that torch keeps for later back to the device."""
        if not self.is_cpu:
            torch.cuda.empty_cache()

    def _free(self) -> int:
        return int(torch.cuda.mem_get_info(self.place)[0])

    def take(self, x: Tensor) -> Tensor:
        """The tensor on this device."""
        return x if self.is_cpu else x.to(self.place)


def find_device(name: str) -> Device:
    """The device of a name: `cpu`, `cuda`, `cuda:1`, or `auto`, which is CUDA where it can be used.

    Raises:
        ArgumentError: the name is none of these, or the device cannot be used; says why.

    Example:
        >>> find_device("cpu").note
        'cpu'
    """
    if name == "cpu":
        return Device(torch.device("cpu"), "cpu")
    index = 0 if name == AUTO else _index_of(name)
    reason = why_not(index)
    if reason is None:
        place = torch.device("cuda", index)
        return Device(place, f"{place} ({torch.cuda.get_device_name(place)})")
    if name == AUTO:
        return Device(torch.device("cpu"), f"cpu ({reason})")
    raise ArgumentError(f"device {name}: {reason}. Use --device cpu, or auto")


def _index_of(name: str) -> int:
    # torch keeps eight bits of an index: it takes cuda:255 for cuda, and cuda:256 for cuda:0.
    found = re.fullmatch(r"cuda(?::([0-9]{1,9}))?", name)
    if found is None:
        kind = name.partition(":")[0]
        other = kind not in {"cpu", "cuda"} and _is_a_kind(kind)
        lacking = "lipfast has no kernels for it; " if other else ""
        raise ArgumentError(f"device '{name}': {lacking}{_EXPECTED}")
    return int(found[1] or 0)


def _is_a_kind(kind: str) -> bool:
    try:
        return torch.device(kind).type == kind
    except RuntimeError:
        return False


def why_not(index: int) -> str | None:
    """Why a CUDA device cannot be used; None where it can."""
    reason = no_cuda_device()
    if reason is not None:
        return reason
    if cuda_info() is None:
        return f"no CUDA kernels: {cuda_reason()}"
    count = torch.cuda.device_count()
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        return f"there is no such device; there {'is' if count == 1 else 'are'} {there}"
    try:
        torch.ones(1, device=torch.device("cuda", index)).tolist()
    except RuntimeError as error:  # too old a driver, another process's device, ...
        return f"it cannot be used ({first_line(error)})"
    return None
