"""State dicts of many networks of one architecture: one tensor per name for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import overload

from torch import Tensor

from lipfast.errors import ArgumentError


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
