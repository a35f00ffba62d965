"""State dicts against a plan: names, shapes, dtypes, finite entries; and stacks of many."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipfast.errors import NonFiniteError, StateDictError
from lipfast.plan.renamed import is_counter, is_extra_state, loaded_names
from lipfast.plan.stacked import ResolvedNetworks

# What DataParallel and torch.compile put in front of every name.
_PREFIXES = ("module.", "_orig_mod.")


def without_wrapper_prefix(
    state_dict: Mapping[str, Tensor], parameters: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Tensor]:
    """Return the state dict of the module inside a wrapper, if the names say that there was one."""
    for _ in range(len(_PREFIXES) + 1):
        if not state_dict or any(name in parameters for name in state_dict):
            return state_dict
        prefix = next(
            (p for p in _PREFIXES if all(name.startswith(p) for name in state_dict)), None
        )
        if prefix is None:
            return state_dict
        state_dict = {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def entries_of(
    state_dict: Mapping[str, Tensor],
    parameters: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, tuple[str, ...]],
    where: str = "",
) -> dict[str, Tensor]:
    """Collect the entries that a plan needs, of the right shapes, under the plan's names.

    Args:
        state_dict: name -> tensor.
        parameters: name -> shape: what it must hold.
        aliases: name -> other names of the same tensor; one of them is enough.
        where: prefix for messages (which entry of a list).

    Returns:
        name -> tensor, for every name in `parameters` but extra state and counters that are not
        there. Arrays of numpy are tensors then. As in torch, `weight_g` and `weight_v` count for a
        parametrization of weight norm.

    Raises:
        StateDictError: names are missing or unexpected, or a tensor has the wrong shape or dtype.
    """
    if not isinstance(state_dict, Mapping):
        raise StateDictError(
            f"{where}expected a state dict (name -> tensor), not {type(state_dict).__name__}; "
            "for a module give model.state_dict()"
        )
    state_dict = without_wrapper_prefix(state_dict, parameters)
    resolved: dict[str, Tensor] = {}
    missing: list[str] = []
    renamed: set[str] = set()
    for name, shape in parameters.items():
        if is_extra_state(name):
            continue
        tensor = state_dict.get(name)
        if tensor is None:
            others = (*aliases.get(name, ()), *loaded_names(name))
            other = next((other for other in others if other in state_dict), None)
            if other is not None:
                renamed.add(other)
                tensor = state_dict[other]
            elif is_counter(name):
                continue
            else:
                missing.append(name)
                continue
        tensor = _as_tensor(tensor)
        if not isinstance(tensor, Tensor):
            raise StateDictError(f"{where}'{name}' is a {type(tensor).__name__}, not a tensor")
        if tuple(tensor.shape) != shape:
            raise StateDictError(
                f"{where}parameter '{name}' has shape {tuple(tensor.shape)}, but the architecture "
                f"has {shape}"
            )
        resolved[name] = _widened(tensor)
    unexpected = [
        name
        for name in state_dict
        if name not in parameters and name not in renamed and not is_extra_state(name)
    ]
    if missing or unexpected:
        raise StateDictError(where + _mismatch(missing, unexpected, parameters, state_dict))
    if aliases:
        _check_tied(state_dict, aliases, where)
    return resolved


def _as_tensor(value: Any) -> Any:
    """A tensor for an array or scalar of numpy; anything else as it is."""
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "fiub":
        return torch.from_numpy(np.array(value))
    return value


def _mismatch(
    missing: Sequence[str],
    unexpected: Sequence[str],
    parameters: Mapping[str, tuple[int, ...]],
    state_dict: Mapping[str, Tensor],
) -> str:
    parts = []
    if missing:
        shown = _names((name, parameters[name]) for name in missing)
        parts.append(f"the state dict lacks {shown}")
    if unexpected:
        shown = _names((name, getattr(state_dict[name], "shape", ())) for name in unexpected)
        parts.append(f"the architecture does not have {shown}")
    return "state dict does not match the architecture: " + "; ".join(parts)


def _names(entries: Iterable[tuple[str, Sequence[int]]]) -> str:
    listed = list(entries)
    shown = ", ".join(f"'{name}' {tuple(shape)}" for name, shape in listed[:8])
    return shown + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _check_tied(
    state_dict: Mapping[str, Tensor], aliases: Mapping[str, tuple[str, ...]], where: str
) -> None:
    for name, others in aliases.items():
        for other in others:
            first, second = state_dict.get(name), state_dict.get(other)
            if first is None or second is None or first is second:
                continue
            if not torch.equal(_as_tensor(first), _as_tensor(second)):
                raise StateDictError(
                    f"{where}'{name}' and '{other}' are one tensor in the architecture, but differ "
                    "in the state dict"
                )


def require_finite(
    tensors: Mapping[str, Tensor],
    used: Iterable[str],
    where: str = "",
    masks: Collection[str] = (),
) -> None:
    """Check that the parameters that the function depends on are floating and finite.

    Args:
        tensors: name -> tensor.
        used: names of those that are checked.
        where: prefix for messages.
        masks: names of those that may hold -inf.

    Raises:
        StateDictError: one is not of a floating dtype.
        NonFiniteError: one holds NaN or Inf; says which and how many.
    """
    names = list(used)
    if names and not tensors[names[0]].is_cpu:
        for name in names:
            require_dense_numbers(tensors[name], name, where)
        if _look_finite([tensors[name] for name in names]):
            return
    for name in names:
        tensor = tensors[name]
        require_dense_numbers(tensor, name, where)
        # One cheap reduction; a sum of finite entries may overflow, so only then look closely.
        if tensor.element_size() == 1:  # float8: torch does not add it
            tensor = tensor.float()
        if math.isfinite(tensor.detach().sum().item()):
            continue
        finite = torch.isfinite(tensor)
        if name in masks:
            finite |= tensor == -math.inf
        bad = tensor.numel() - int(finite.sum())
        if bad:
            nan = int(torch.isnan(tensor).sum())
            raise NonFiniteError(
                f"{where}parameter '{name}' of shape {tuple(tensor.shape)} holds {bad} "
                f"non-finite {'entry' if bad == 1 else 'entries'} ({nan} NaN, {bad - nan} Inf)"
            )


def _look_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether one look says that all numbers are finite, of tensors on one device."""
    if len({tensor.device for tensor in tensors}) > 1:
        return False
    numbers = [tensor.float() if tensor.element_size() == 1 else tensor for tensor in tensors]
    largest = largest_magnitudes(numbers)
    return not largest or math.isfinite(torch.cat(largest).amax().item())


def require_dense_numbers(tensor: Tensor, name: str, where: str) -> None:
    """Check what can be said of a parameter without its numbers.

    Raises:
        StateDictError: it has no data, is not dense, or not of a floating dtype.
    """
    if tensor.is_meta:
        raise StateDictError(
            f"{where}parameter '{name}' has no data (device meta): load the weights first"
        )
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise StateDictError(
            f"{where}parameter '{name}' has layout {layout}; expected a dense tensor "
            "(tensor.to_dense())"
        )
    if not tensor.dtype.is_floating_point or "float4" in str(tensor.dtype):
        advice = " (tensor.dequantize())" if tensor.is_quantized else ""
        raise StateDictError(
            f"{where}parameter '{name}' has dtype {tensor.dtype}; expected a floating dtype{advice}"
        )


def require_finite_together(
    state_dicts: Sequence[Mapping[str, Tensor]],
    used: Sequence[str],
    wheres: Sequence[str],
    masks: Collection[str] = (),
) -> None:
    """`require_finite` of many state dicts.

    Args:
        state_dicts: name -> tensor, all on one device.
        used: names of those that are checked.
        wheres: for each a prefix for messages.
        masks: names of those that may hold -inf.

    Raises:
        StateDictError, NonFiniteError: see `require_finite`.
    """
    pairs = list(zip(state_dicts, wheres, strict=True))
    for tensors, where in pairs:
        for name in used:
            require_dense_numbers(tensors[name], name, where)
    suspects = used
    if state_dicts and used and state_dicts[0][used[0]].is_cpu:
        suspects = [name for name in used if not _sum_is_finite(name, state_dicts)]
    for tensors, where in pairs:
        require_finite(tensors, suspects, where, masks)


# Entries of a tensor that is put together with those of other networks to look at all of them.
_FEW = 4096
# Entries of a tensor on a device that is looked at alone: of a list, torch takes 20 million at a
# time.
_SHARE = 1 << 22


def _sum_is_finite(name: str, state_dicts: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether a sum says that the small tensors of a name are finite."""
    tensors = [entry[name].detach() for entry in state_dicts]
    if len(tensors) < 2 or tensors[0].numel() > _FEW or len({t.dtype for t in tensors}) > 1:
        return False
    return math.isfinite(torch.stack(tensors).sum().item())


def largest_magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The largest magnitudes of the tensors that are not empty, or NaN: numbers on the device.

    They are of a few kernels, whatever the number of tensors.
    """
    together: dict[torch.dtype, list[Tensor]] = {}
    largest: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > _SHARE:
            norm = torch.linalg.vector_norm(tensor.detach(), math.inf)
            largest.setdefault(tensor.dtype, []).append(norm)
        elif tensor.numel():
            together.setdefault(tensor.dtype, []).append(tensor.detach())
    for dtype, some in together.items():
        largest.setdefault(dtype, []).extend(torch._foreach_norm(some, math.inf))
    return [torch.stack(some) for some in largest.values()]


def _widened(tensor: Tensor) -> Tensor:
    """Floating numbers of eight bits as float32, which holds them exactly and computes."""
    eight_bits = tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1
    return tensor.float() if eight_bits and "float4" not in str(tensor.dtype) else tensor


def stack(
    state_dicts: Sequence[Mapping[str, Tensor]], names: Iterable[str], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Parameters of many networks: (networks, *shape) each, numbers all of one dtype."""
    stacked = {}
    for name in names:
        if isinstance(state_dicts, ResolvedNetworks) and not state_dicts[0][name].is_cpu:
            stacked[name] = floating_as(state_dicts.together(name), dtype)
            continue
        tensors = [entry[name] for entry in state_dicts]
        if tensors[0].is_cpu and all(tensor.dtype.is_floating_point for tensor in tensors):
            # Converted one by one: a second copy of all of them would not stay in the cache.
            result = tensors[0].new_empty((len(tensors), *tensors[0].shape), dtype=dtype)
            for row, tensor in zip(result.unbind(), tensors, strict=True):
                row.copy_(tensor.detach())
            stacked[name] = result
        else:
            stacked[name] = floating_as(torch.stack(tensors).detach(), dtype)
    return stacked


def device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    """Where parameters are, all on one device; the CPU where there are none."""
    return next((tensor.device for tensor in tensors.values()), torch.device("cpu"))


def floating_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in a floating dtype; indices and masks as they are."""
    return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
