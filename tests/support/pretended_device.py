"""A device in pretence: tensors that say cuda:0, keep CUDA's rules, and hold values on the CPU.

Every ATen call is checked as CUDA checks it: operands on two devices are an error (numbers without
dimensions and CPU indices of a device's tensor are allowed; CUDA indices of a CPU tensor are not),
and a native op without a CUDA kernel is one, too. Kernel launches, host syncs and copies are
counted. What it cannot show: `torch.export` does not see through it (a model is exported with the
values that it pretends to have elsewhere), and native ops run their CPU kernels.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # dispatch modes import it: better before torch.cuda is another
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from lipfast import _native
from tests.support import secants_on_cpu  # noqa: F401 - registers what has no CPU kernel

CUDA = torch.device("cuda:0")
CPU = torch.device("cpu")
# Device types that a tensor may pretend to be on.
ELSEWHERE = ("cuda", "mps", "xpu")
# Of tangents and gradients that C++ fills in, which knows of no device here: fitting to any.
NOWHERE = torch.device("lazy")
_ROOT = Path(__file__).parents[2]
# Native ops with kernels for CUDA.
NATIVE_ON_CUDA = {
    name
    for path in (_ROOT / "csrc/ops/cuda").glob("*.cpp")
    for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
}

_INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
_COPIES = {"copy_", "_to_copy", "set_"}
# The host waits: for sizes, for numbers, or for the info of a factorisation.
_SYNCS = {
    "_local_scalar_dense",
    "nonzero",
    "equal",
    "is_nonzero",
    "masked_select",
    "_linalg_eigh",
    "_linalg_svd",
    "linalg_eig",
    "linalg_cholesky",
    "_linalg_solve",
    "linalg_inv",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}
# Nothing is launched for these.
_FREE = {
    *("_local_scalar_dense", "_unsafe_view", "detach", "lift", "lift_fresh", "alias", "set_"),
    *("resize_", "is_same_size", "_has_same_storage_numel"),
}
# A kernel of torch's that takes a list takes this many tensors per launch.
_PER_LAUNCH = 128


@dataclass
class Counts:
    """What a device was asked to do.

    Attributes:
        launches: kernels; a list of tensors takes one per 128 of them.
        syncs: how often the host waited for a result.
        copies: from the host to the device; every one that is not ``non_blocking`` makes the host
            wait as well, for the stream, and is in `blocking`.
        blocking: see `copies`.
        fetches: copies from the device that are ``non_blocking``: until the host has waited, what
            they fill holds no numbers.
        ops: launches by the name of the op.
        waits: syncs by the name of the op.
    """

    launches: int = 0
    syncs: int = 0
    copies: int = 0
    blocking: int = 0
    fetches: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        """Count from zero."""
        self.__init__()

    def launch(self, name: str, times: int = 1) -> None:
        """Count launches of an op."""
        self.launches += times
        self.ops[name] += times

    def sync(self, name: str) -> None:
        """Count a sync of an op; all that was queued before it is done."""
        self.syncs += 1
        self.waits[name] += 1
        while _UNDER_WAY:
            copied, values = _UNDER_WAY.pop()
            with _disable_current_modes():
                copied.copy_(values)

    def copy(self, non_blocking: bool) -> None:
        """Count a copy to the device."""
        self.copies += 1
        self.blocking += not non_blocking


# Copies to the host that nobody has waited for, and what they will hold.
_UNDER_WAY: list[tuple[Tensor, Tensor]] = []
COUNTS = Counts()


class Pretended(Tensor):
    """A tensor that says that it is on a device, and holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device = CUDA) -> Pretended:
        assert not isinstance(inner, Pretended)
        # C++ sees a CPU tensor (a CPU build refuses any other); Python sees the device.
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CPU,
            requires_grad=False,
        )

    def __init__(self, inner: Tensor, device: torch.device = CUDA) -> None:
        self.inner = inner
        self.place = device

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return CUDA if self.place == NOWHERE else self.place

    @property
    def is_cuda(self) -> bool:
        return self.place.type == "cuda"

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.place.index or 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        COUNTS.sync("tolist")
        return self.detach().inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy")

    __array__ = numpy

    def __deepcopy__(self, memo: dict[int, Any]) -> Pretended:
        if id(self) not in memo:
            made: Any = Pretended(self.detach().inner.clone(), self.place)
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, requires_grad=self.requires_grad)
            else:
                made.requires_grad_(self.requires_grad)
            memo[id(self)] = made
        return memo[id(self)]

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype}, {self.place})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], self.place

    @staticmethod
    def __tensor_unflatten__(inners: Any, place: Any, *_: Any) -> Pretended:
        return Pretended(inners["inner"], place)


def _devices_of(tensors: Sequence[Tensor]) -> list[torch.device]:
    devices = dict.fromkeys(getattr(tensor, "place", tensor.device) for tensor in tensors)
    return [device for device in devices if device != NOWHERE]


def _check(name: str, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """CUDA's rules about the operands of one call."""
    if name in _COPIES or len(_devices_of(tensors)) < 2:
        return
    if name in _INDEXING:
        indices = [index for index in args[1] or () if index is not None]
        if args[0].device == CPU:
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        COUNTS.copies += sum(index.device == CPU for index in indices)
        COUNTS.blocking += sum(index.device == CPU for index in indices)
        tensors = [t for t in tensors if not any(t is index for index in indices)]
    if torch._C._current_graph_task_id() >= 0:  # gradients of zero that C++ fills in
        tensors = [t for t in tensors if isinstance(t, Pretended) or bool(t.any())]
    devices = _devices_of([t for t in tensors if t.dim() > 0 and not t._is_zerotensor()])
    if len(devices) > 1 or any(d not in (CPU, *devices) for d in _devices_of(tensors)):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(map(str, _devices_of(tensors)))}! ({name})"
        )
    if devices == [CPU]:
        raise RuntimeError(f"Expected all tensors to be on the same device ({name})")


def _check_native(name: str, device: torch.device) -> None:
    if device.type == "cuda" and name not in NATIVE_ON_CUDA:
        raise NotImplementedError(
            f"Could not run 'lipfast::{name}' with arguments from the 'CUDA' backend"
        )
    if device.type in ("mps", "xpu"):
        raise NotImplementedError(f"Could not run 'lipfast::{name}' on {device}")


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _target(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], held: list[Tensor]) -> Any:
    """The device of what a call returns."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    if name == "copy_":
        return args[0].device
    found = _devices_of([tensor for tensor in held if tensor.dim()]) or _devices_of(held)
    elsewhere = [device for device in found if device.type in ELSEWHERE]
    nowhere = any(getattr(tensor, "place", None) == NOWHERE for tensor in held)
    if elsewhere or not nowhere:
        return elsewhere[0] if elsewhere else CPU
    return CPU if any(tensor.device == CPU and tensor.dim() for tensor in held) else NOWHERE


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """One ATen call: checked, counted, and done on the CPU."""
    namespace, _, name = func._schema.name.partition("::")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    target = _target(name, args, kwargs, tensors)
    held = any(isinstance(tensor, Pretended) for tensor in tensors)
    if name == "_efficientzerotensor":
        return Pretended(torch.zeros(args[0], dtype=kwargs.get("dtype")), NOWHERE)
    if name in ("zeros", "ones") and not tensors and torch._C._current_graph_task_id() >= 0:
        return Pretended(func(*args, **kwargs), NOWHERE)  # a gradient that the engine fills in
    if not held and target.type not in ELSEWHERE:
        return func(*args, **kwargs)
    _check(name, args, tensors)
    if namespace == "lipfast":
        _check_native(name, target)
    inner_args, inner_kwargs = tree_map_only(Pretended, lambda t: t.inner, (tuple(args), kwargs))
    if kwargs.get("device") is not None:
        inner_kwargs = {**inner_kwargs, "device": CPU}
        if name != "_pin_memory":
            inner_kwargs.pop("pin_memory", None)
    _count(func, name, args, kwargs, target)
    out = func(*inner_args, **inner_kwargs)
    if (namespace, name) == ("lipfast", "spectral_norms"):
        out = _without_certificates(out)
    if target == CPU or name == "_local_scalar_dense":
        return out
    wrapped = tree_map_only(Tensor, lambda t: Pretended(t, target), out)
    return return_and_correct_aliasing(func, tuple(args), kwargs, wrapped)


def _without_certificates(out: Any) -> Any:
    """As the CUDA kernel answers: Hoelder's upper bounds only, which are looser."""
    lower, upper, passes, codes, *vectors = out
    proved = codes == 1
    return lower, torch.where(proved, upper * 2, upper), passes, codes + proved.to(codes), *vectors


def _count(
    func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], target: torch.device
) -> None:
    if name in _SYNCS:
        COUNTS.sync(name)
    if name in _INDEXING and any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for index in args[1] or ()
    ):
        COUNTS.sync("boolean index")
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        COUNTS.sync(name)
    source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
    if source is not None and source.device != target:
        non_blocking = bool(kwargs.get("non_blocking") or (name == "copy_" and any(args[2:3])))
        if target == CPU:
            COUNTS.sync("copy to the host")
        elif source.device == CPU:
            COUNTS.copy(non_blocking)
        return
    if (
        target == NOWHERE
        or _is_view(func)
        or name in _FREE
        or name.startswith(("empty", "new_empty"))
    ):
        return
    if func._schema.name.startswith("lipfast::chain_"):
        return COUNTS.launch(name, _launches_of_chains(name, *args[1:4]))
    if name in _NATIVE_LAUNCHES:
        return COUNTS.launch(name, _NATIVE_LAUNCHES[name](args))
    listed = max((len(a) for a in args if isinstance(a, (list, tuple)) and _tensors(a)), default=1)
    if func._schema.name == "lipfast::stack":
        return COUNTS.launch(name, math.ceil(listed / 1000))
    COUNTS.launch(name, 1 if name in _INDEXING else _launches(listed))


def _of_spectral_norms(args: Sequence[Any]) -> int:
    """The table of matrices, those that blocks hold by their size, and those of the whole grid."""
    matrices = args[0]
    entries = [(m.data_ptr(), m.shape, m.dtype) for m in matrices]
    bytes_of = [m.numel() * m.itemsize if m.shape[1] <= 256 else 1 << 30 for m in matrices]
    groups = {0 if size <= 64 << 10 else 1 if size <= 384 << 10 else 2 for size in bytes_of}
    return (1 if _repeat(entries) else math.ceil(len(matrices) / 22)) + len(groups)


def _repeat(entries: Sequence[tuple[int, Any, Any]]) -> bool:
    """Whether matrices lie at equal distances, of shapes that repeat."""
    if len(entries) <= 22:
        return True
    for period in range(1, 23):
        pairs = [
            (one[0] - other[0], one[1:] == other[1:])
            for one, other in zip(entries[period:], entries, strict=False)
        ]
        steps = [step for step, _ in pairs]
        if all(alike for _, alike in pairs) and steps[period:] == steps[:-period]:
            return True
    return False


# Of lipfast's ops that take several.
_NATIVE_LAUNCHES: dict[str, Callable[[Sequence[Any]], int]] = {
    "spectral_norms": _of_spectral_norms,
    "cholesky_bounds": lambda _: 2,
}


def _launches_of_chains(
    name: str, weights: Sequence[Tensor], biases: Sequence[Tensor], stages: Sequence[int]
) -> int:
    """As csrc/ops/cuda/chain_maps.h: one for rows of stacked tensors, else one per table."""
    affine = [kind in (0, 1) for kind in stages[::12]]
    layers = sum(affine) if name == "chain_jacobian_norms" else list(stages).count(-1)

    def spaced(tensors: Sequence[Tensor]) -> bool:
        places = [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]
        columns = [places[layer::layers] for layer in range(layers)]
        steps = [{b - a for a, b in itertools.pairwise(column)} for column in columns]
        return all(len(step) < 2 for step in steps)

    if spaced(weights) and spaced(biases):
        return 1
    return math.ceil(len(weights) // layers / (_PER_LAUNCH // layers))


def _tensors(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def _launches(tensors: int) -> int:
    return math.ceil(tensors / _PER_LAUNCH)


class _Calls(TorchDispatchMode):
    """Sees the calls that have no operand on the device: factories."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _device_of(value: object) -> torch.device | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return torch.device("cuda", value)
    if isinstance(value, (str, torch.device)):
        device = torch.device(value)
        return CUDA if device == torch.device("cuda") else device
    return None


# What a tensor says of its device; one that `torch.func.vmap` maps over asks C++, not Python.
_SAYS_WHERE = ("device", "is_cuda", "is_cpu")


def _said(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """As torch says it, but where a tensor is that vmap maps over."""
    if name == "__get__" and func.__self__.__name__ in _SAYS_WHERE:
        tensor = args[0]
        while torch._C._functorch.is_batchedtensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if isinstance(tensor, Pretended):
            return getattr(tensor, func.__self__.__name__)
    return func(*args, **kwargs)


class _Moves(torch.overrides.TorchFunctionMode):
    """What a CPU build of torch refuses: factories on the device, and moves to and from it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" or not _AWAKE[0]:
            return _said(name, func, args, kwargs)
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return _moved(name, func, args, kwargs)
        if name == "new_tensor" and isinstance(args[0], Pretended):
            name, func = "tensor", torch.tensor
            kwargs = {"dtype": args[0].dtype, "device": args[0].device, **kwargs}
            args = args[1:]
        if name == "pin_memory" and args and isinstance(args[0], Tensor):
            return args[0].clone()
        if name == "one_hot" and isinstance(args[0], Pretended):  # makes its arange in C++
            COUNTS.launch(name)
            return Pretended(func(args[0].inner, *args[1:], **kwargs), args[0].device)
        device = _device_of(kwargs.get("device"))
        if kwargs.get("pin_memory") and (device is None or device == CPU):
            kwargs.pop("pin_memory")
        if device is None or device.type not in ELSEWHERE:
            return func(*args, **kwargs)
        kwargs["device"] = CPU
        out = func(*args, **kwargs)
        if name in ("tensor", "as_tensor", "asarray"):
            COUNTS.copy(False)
        elif not name.startswith("empty"):
            COUNTS.launch(name)
        return out if isinstance(out, Pretended) else _on(out, device)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    made = Pretended(tensor.detach(), device)
    return made.requires_grad_() if tensor.requires_grad else made


def _moved(name: str, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """`Tensor.to`, `cuda` and `cpu`."""
    tensor, rest = args[0], list(args[1:])
    target, non_blocking = None, bool(kwargs.pop("non_blocking", False))
    if name != "to":
        target = _device_of(rest[0] if rest else name)
        rest = []
    for index, value in enumerate(rest):
        if isinstance(value, Tensor):
            target, rest[index] = value.device, value.dtype
        elif _device_of(value) is not None:
            target, rest[index] = _device_of(value), None
    target = _device_of(kwargs.pop("device", None)) or target
    dtypes = [value for value in rest if isinstance(value, torch.dtype)]
    flags = [value for value in rest if isinstance(value, bool)]
    non_blocking |= bool(flags[:1] and flags[0])
    copies = bool(flags[1:] and flags[1]) or bool(kwargs.pop("copy", False))
    if dtypes:
        kwargs["dtype"] = dtypes[0]
    if kwargs.get("dtype") is not None or kwargs.get("memory_format") is not None:
        tensor = func(tensor, **kwargs)
    if target is not None and _device_of(target) != tensor.device:
        return _carried(tensor, target, non_blocking)
    return tensor.clone() if copies and tensor is args[0] else tensor


def _carried(tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
    if target.type == "meta":
        return tensor.to("meta")
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Carry.apply(tensor, target, non_blocking)
    return _copied(tensor, target, non_blocking)  # vmap takes no function with a gradient


def _copied(tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
    inner = tensor.detach().inner if isinstance(tensor, Pretended) else tensor.detach()
    with _disable_current_modes():
        values = inner.clone()
    if target == CPU and non_blocking:
        return _under_way(values)
    if target == CPU:
        COUNTS.sync("copy to the host")
        return values
    if tensor.device == CPU:
        COUNTS.copy(non_blocking)
    return Pretended(values, target)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
        ctx.back = tensor.device
        return _copied(tensor, target, non_blocking)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _carried(gradients[0], ctx.back, False), None, None


def _under_way(values: Tensor) -> Tensor:
    """A tensor of the host that `values` are copied to when it waits; until then it is garbage."""
    COUNTS.fetches += 1
    with _disable_current_modes():
        fills = math.nan if values.is_floating_point() else 1
        copied = torch.full_like(values, fills)
    _UNDER_WAY.append((copied, values))
    return copied


def on_device(value: Any, device: torch.device | str = CUDA) -> Any:
    """A tensor, a mapping or a sequence of them, with copies of the values on a device."""
    place = _device_of(device)
    assert place is not None
    if isinstance(value, Tensor):
        return Pretended(value.detach().clone(), place).requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return {key: on_device(entry, place) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(entry, place) for entry in value)
    return value


def module_on_device(module: nn.Module, device: torch.device | str = CUDA) -> nn.Module:
    """A copy of a module whose tensors are on a device; tied ones stay tied."""
    place = _device_of(device)
    assert place is not None
    memo: dict[int, Any] = {}
    for owner in module.modules():
        for value in _tensors_of(owner):
            if id(value) not in memo:
                moved = Pretended(value.detach().clone(), place)
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(moved, requires_grad=value.requires_grad)
                else:
                    memo[id(value)] = moved
    return copy.deepcopy(module, memo)


def _tensors_of(owner: nn.Module) -> Iterator[Tensor]:
    tables = (owner._parameters, owner._buffers, vars(owner))
    for table in tables:
        yield from (value for value in table.values() if isinstance(value, Tensor))


@contextlib.contextmanager
def _seen_through(module: nn.Module) -> Iterator[None]:
    """A module's tensors on the device replaced by their values."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    known: dict[int, Any] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers, vars(owner)):
            for key, value in table.items():
                if isinstance(value, Pretended):
                    changed.append((table, key, value))
    try:
        for table, key, value in changed:
            if id(value) not in known:
                plain = value.inner
                known[id(value)] = (
                    nn.Parameter(plain, requires_grad=value.requires_grad)
                    if isinstance(value, nn.Parameter)
                    else plain
                )
            table[key] = known[id(value)]
        yield
    finally:
        for table, key, value in changed:
            table[key] = value


def _seeing_through(export: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.export.export`, which cannot see through the pretence."""

    def exported(module: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        plain = tree_map_only(Pretended, lambda t: t.inner, inputs)
        with _seen_through(module), _disable_current_modes(), _asleep():
            return export(module, plain, *args, **kwargs)

    return exported


_AWAKE = [True]


@contextlib.contextmanager
def _asleep() -> Iterator[None]:
    before, _AWAKE[0] = _AWAKE[0], False
    try:
        yield
    finally:
        _AWAKE[0] = before


class Stream:
    """A stream in pretence: everything is done when it is queued."""

    device = CUDA

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        """Wait on the device, not on the host."""

    def wait_event(self, event: Event) -> None:
        """Wait on the device, not on the host."""

    def record_event(self, event: Event | None = None) -> Event:
        """An event that is over when all copies so far have arrived."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """Whether all is done."""
        return True

    def synchronize(self) -> None:
        """The host waits."""
        COUNTS.sync("synchronize")


class Event:
    """An event in pretence: over when the host has waited for anything since it was recorded."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._copies: list[Tensor] = []

    def record(self, stream: Stream | None = None) -> None:
        """Note what is under way."""
        self._copies = [copied for copied, _ in _UNDER_WAY]

    def wait(self, stream: Stream | None = None) -> None:
        """Wait on the device, not on the host."""

    def query(self) -> bool:
        """Whether all copies before it have arrived."""
        return not any(copied is other for copied in self._copies for other, _ in _UNDER_WAY)

    def synchronize(self) -> None:
        """The host waits."""
        COUNTS.sync("synchronize")


@dataclass
class Device:
    """What a device in pretence says of itself; tests may set other values.

    Attributes:
        count: of devices.
        free: bytes.
        total: bytes.
        capability: of its processors.
    """

    count: int = 1
    free: int = 78 << 30
    total: int = 80 << 30
    capability: tuple[int, int] = (9, 0)
    multi_processor_count: int = 132
    name: str = "pretended"

    @property
    def total_memory(self) -> int:
        """As `torch.cuda.get_device_properties` calls it."""
        return self.total


@contextlib.contextmanager
def pretended_device(device: Device | None = None) -> Iterator[Counts]:
    """A CUDA device is there, with lipfast's kernels for it; what it is asked to do is counted."""
    device = device or Device()

    def of_cuda(name: str, value: Any) -> Any:
        return mock.patch.object(torch.cuda, name, value)

    def ignored(*_: Any, **__: Any) -> Any:
        return contextlib.nullcontext()

    def seeded(_: object = None) -> Tensor:
        return torch.get_rng_state()

    patches = [
        mock.patch.object(
            _native, "_cuda_info", dict.fromkeys(("version", "nvcc", "architectures"), "pretended")
        ),
        mock.patch.object(_native, "_cuda_reason", None),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(torch.export, "export", _seeing_through(torch.export.export)),
        of_cuda("is_available", lambda: True),
        of_cuda("is_initialized", lambda: True),
        of_cuda("init", lambda: None),
        of_cuda("_lazy_init", lambda: None),
        of_cuda("device_count", lambda: device.count),
        of_cuda("current_device", lambda: 0),
        of_cuda("set_device", ignored),
        of_cuda("device", ignored),
        of_cuda("get_device_name", lambda *_: device.name),
        of_cuda("get_device_capability", lambda *_: device.capability),
        of_cuda("get_device_properties", lambda *_: device),
        of_cuda("mem_get_info", lambda *_: (device.free, device.total)),
        of_cuda("empty_cache", lambda: None),
        of_cuda("synchronize", lambda *_: COUNTS.sync("synchronize")),
        of_cuda("get_rng_state", seeded),
        of_cuda("set_rng_state", lambda state, *_: torch.set_rng_state(state)),
        of_cuda("Stream", Stream),
        of_cuda("Event", Event),
        of_cuda("stream", ignored),
        of_cuda("current_stream", Stream),
        of_cuda("default_stream", Stream),
    ]
    COUNTS.clear()
    _UNDER_WAY.clear()
    threads = torch.autograd.is_multithreading_enabled()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        # The modes belong to this thread; derivatives must be made in it.
        torch.autograd.set_multithreading_enabled(False)
        stack.callback(torch.autograd.set_multithreading_enabled, threads)
        stack.enter_context(_Calls())
        stack.enter_context(_Moves())
        yield COUNTS
