"""What a model returns: the tensors inside tuples, dictionaries and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
import enum
import functools
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lipfast.errors import ArgumentError

# What no tensor can be in.
_NUMERIC = (bool, int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
_WITHOUT_TENSORS = (*_NUMERIC, type(None), str, bytes, torch.dtype, torch.device, enum.Enum)


def returned_tensors(outputs: Any) -> Iterator[Tensor]:
    """All tensors in what a model returns, in order; numbers, words and None beside them are none.

    Raises:
        ArgumentError: something in it may hold tensors that cannot be seen.

    Examples:
        >>> [tensor.item() for tensor in returned_tensors({"a": torch.ones(()), "b": [None, 3]})]
        [1.0]
    """
    if isinstance(outputs, Tensor):
        yield outputs
    elif not isinstance(outputs, _WITHOUT_TENSORS):
        for entry in _values_in(outputs):
            yield from returned_tensors(entry)


def _values_in(outputs: Any) -> Iterable[Any]:
    known = pytree.SUPPORTED_NODES.get(type(outputs))
    if known is not None:
        return known.flatten_fn(outputs)[0]
    if isinstance(outputs, Mapping):  # that of Hugging Face is a dataclass, too
        return outputs.values()
    if isinstance(outputs, (tuple, list)):
        return outputs
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return [getattr(outputs, field.name) for field in dataclasses.fields(outputs)]
    raise ArgumentError(
        f"the model returns a {type(outputs).__name__}, in which lipfast does not see tensors: "
        "wrap it in a module that returns a tensor, or a tuple, list, dictionary or dataclass of "
        "them (caches of keys and values: use_cache=False)"
    )


def is_known_to_torch(outputs: Any) -> bool:
    """Whether torch.export takes it."""
    leaves = pytree.tree_leaves(outputs)
    return all(isinstance(leaf, (Tensor, type(None), bool, int, float, str)) for leaf in leaves)


def returning_tensors(module: nn.Module) -> nn.Module:
    """A module with the same tensors and submodules that returns a tuple of tensors."""
    alike = copy.copy(module)
    own = vars(module).get("forward") or types.MethodType(type(module).forward, alike)

    @functools.wraps(own)
    def forward(*inputs: Any, **named: Any) -> tuple[Tensor, ...]:
        return tuple(returned_tensors(own(*inputs, **named)))

    vars(alike)["forward"] = forward
    return alike
