"""What a module is while it is traced or evaluated, and what is kept of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DataParallel, DistributedDataParallel or `torch.compile`."""
    while True:
        parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
        inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Every submodule in eval mode and uncompiled inside, exactly as it was afterwards.

    Flags are set directly: `Module.train` may be overridden to do more. The random number
    generators are restored as well, and what forward puts in the place of buffers and other
    attributes (a cache would keep a tensor of the trace, without data).
    """
    modules = list(model.modules())
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_attributes_kept(module))
        with _in_evaluation_mode(modules):
            yield


@contextlib.contextmanager
def _attributes_kept(module: nn.Module) -> Iterator[None]:
    attributes = vars(module)
    tables = [attributes, module._buffers]
    tables += [value for value in attributes.values() if type(value) is dict]
    copies = [dict(table) for table in tables]
    lists = [value for value in attributes.values() if type(value) is list]
    entries = [list(value) for value in lists]
    try:
        yield
    finally:
        for table, copy in zip(tables, copies, strict=True):
            for name in table.keys() - copy.keys():
                del table[name]
            for name, value in copy.items():
                if name not in table or table[name] is not value:
                    table[name] = value
        for found, copied in zip(lists, entries, strict=True):
            if list(map(id, found)) != list(map(id, copied)):
                found[:] = copied


@contextlib.contextmanager
def _in_evaluation_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    flags = [module.training for module in modules]
    compiled = [getattr(module, "_compiled_call_impl", None) for module in modules]
    try:
        for module in modules:
            module.training = False
            if getattr(module, "_compiled_call_impl", None) is not None:
                module._compiled_call_impl = None
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, flag, implementation in zip(modules, flags, compiled, strict=True):
            module.training = flag
            if implementation is not None:
                module._compiled_call_impl = implementation


def shapes_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a state dict, which may hold other things."""
    tensors = ((name, value) for name, value in state_dict.items() if isinstance(value, Tensor))
    return {name: tuple(tensor.shape) for name, tensor in tensors}


def aliases_of(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Name -> other names of the same tensor, from a state dict with `keep_vars=True`."""
    groups: dict[int, list[str]] = {}
    for name, value in state_dict.items():
        if isinstance(value, Tensor):
            groups.setdefault(id(value), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }
