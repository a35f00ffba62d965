"""State dicts of many networks of one architecture: one tensor per name for all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.stack import stacked

# Tensors that a kernel of torch takes at a time: fewer need not lie together.
_AT_A_TIME = 128
# Bytes of all networks: the copy of more of them would leave little memory for the work.
_MOST_BYTES = 1 << 31


class StackedStateDicts(Sequence[Mapping[str, Tensor]]):
    """A list of state dicts that lie together: the entries are views.

    Whatever takes a list of state dicts takes it. Checks and compositions are made for all networks
    at once, which for small networks is most of the work.

    Args:
        tensors: name -> (N, *shape), of N >= 1 networks, all on one device.

    Raises:
        ArgumentError: there are none, or their first dimensions differ.

    Example:
        >>> import torch
        >>> networks = StackedStateDicts({"weight": torch.eye(2).expand(3, 2, 2)})
        >>> len(networks), networks[0]["weight"].shape
        (3, torch.Size([2, 2]))
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        counts = {tuple(tensor.shape[:1]) for tensor in self.tensors.values()}
        if len(counts) != 1 or counts & {(), (0,)}:
            raise ArgumentError(
                "stacked state dicts need tensors (networks, *shape) of one number of networks, "
                f"got {sorted(counts)}"
            )
        ((self._count,),) = counts

    @cached_property
    def entries(self) -> list[dict[str, Tensor]]:
        """The state dicts, one by one."""
        rows = zip(*(tensor.unbind() for tensor in self.tensors.values()), strict=True)
        return [dict(zip(self.tensors, row, strict=True)) for row in rows]

    @overload
    def __getitem__(self, network: int) -> Mapping[str, Tensor]: ...
    @overload
    def __getitem__(self, network: slice) -> Sequence[Mapping[str, Tensor]]: ...
    def __getitem__(
        self, network: int | slice
    ) -> Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]:
        return self.entries[network]

    def __len__(self) -> int:
        return self._count


def stacked_entries(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Many state dicts on a CUDA device as one tensor per name, so that launches take all of them.

    None where they are few or large, differ in names, dtypes or devices, or do not fit into memory.
    """
    first = entries[0]
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    if len(entries) * len(first) <= _AT_A_TIME or len(entries) * size > _MOST_BYTES:
        return None
    forms = [_form(tensor) for tensor in first.values()]
    for entry in entries:
        if entry.keys() != first.keys() or [_form(entry[name]) for name in first] != forms:
            return None
    if not all(tensor.is_cuda and tensor.layout == torch.strided for tensor in first.values()):
        return None
    try:
        return {name: stacked([entry[name] for entry in entries]) for name in first}
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        return None


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.device, tensor.layout, tensor.is_nested


class ResolvedNetworks(list[dict[str, Tensor]]):
    """Tensors of some networks under an architecture's names: of each, and of all together.

    A list of state dicts becomes one tensor per name only where somebody asks for it.

    Args:
        entries: of each network.
        stacked: name -> (N, *shape), of the tensors that lie together already.
    """

    def __init__(
        self, entries: Iterable[dict[str, Tensor]], stacked: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(entries)
        self._stacked = dict(stacked or {})

    def together(self, name: str) -> Tensor:
        """(N, *shape), in the common dtype; without gradients."""
        found = self._stacked.get(name)
        if found is None:
            found = self._stacked[name] = stacked([entry[name] for entry in self])
        return found.detach()

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """`together` of those names that every network has."""
        return {name: self.together(name) for name in names if all(name in one for one in self)}

    @property
    def stacked(self) -> Mapping[str, Tensor]:
        """The tensors that lie together."""
        return self._stacked

    def lies_together(self, name: str) -> bool:
        """Whether the tensors of a name are one already."""
        return name in self._stacked

    def with_tensors(self, more: Mapping[str, Tensor]) -> ResolvedNetworks:
        """With other tensors beside these, (N, *shape) each."""
        rows = zip(*(tensor.unbind() for tensor in more.values()), strict=True)
        added = [dict(zip(more, row, strict=True)) for row in rows] or [{} for _ in self]
        entries = [{**entry, **own} for entry, own in zip(self, added, strict=True)]
        return ResolvedNetworks(entries, {**self._stacked, **more})

    def some(self, chosen: Sequence[int]) -> ResolvedNetworks:
        """Those at some positions."""
        if list(chosen) == list(range(len(self))):
            return self
        return ResolvedNetworks(self[index] for index in chosen)
