"""Modules whose forward writes to what they hold, and what a module holds as data to compare."""

from __future__ import annotations

import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 4


class Writer(nn.Module):
    """A layer, some state of every kind, and a function that writes to it before the layer."""

    def __init__(self, write: Callable[[Writer, Tensor], object]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, WIDTH))
        self.register_buffer("mean", torch.arange(float(WIDTH)))
        self.register_buffer("hidden", torch.ones(WIDTH), persistent=False)
        self.register_buffer("absent", None)
        self.plain = torch.full((WIDTH,), 3.0)
        self.view = torch.arange(12.0).reshape(3, 4).t()[:, 1:]
        self.sparse = torch.eye(WIDTH).to_sparse()
        self.flag, self.count, self.cache = False, 0, None
        self.table: dict[str, Any] = {"deep": {"list": [1, [2, torch.ones(2)]]}}
        self.items: list[Any] = []
        self.pair = ([], {"a": torch.zeros(2)})
        self.chosen: set[int] = {1, 2}
        self.array = np.arange(4.0)
        self.namespace = types.SimpleNamespace(last=None, inner=Slotted())
        self.generator = torch.Generator().manual_seed(3)
        self.own_random = random.Random(5)
        self.numpy_random = np.random.default_rng(7)
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        result: Tensor = self.layer(x)
        return result


class Slotted:
    """An object without a dict."""

    __slots__ = ("best", "values")

    def __init__(self) -> None:
        self.best, self.values = None, [torch.ones(1)]


def _retie(model: Writer, _: Tensor) -> None:
    model._parameters["scale"] = nn.Parameter(torch.zeros(WIDTH))


def _remove(model: Writer, _: Tensor) -> None:
    del model._buffers["hidden"]
    if hasattr(model, "plain"):
        del model.plain


def _copy_without_grad(model: Writer, x: Tensor) -> None:
    with torch.no_grad():
        model.scale.copy_(torch.ones(WIDTH))
        model.mean.zero_()
        model.plain.add_(1)


def _clip(model: Writer, _: Tensor) -> None:
    with torch.no_grad():
        model.layer.weight.data.clamp_(-0.1, 0.1)


def _gradients(model: Writer, _: Tensor) -> None:
    with torch.enable_grad():
        (model.scale * 2).sum().backward()
    model.layer.bias.grad = None


def _draw(model: Writer, _: Tensor) -> None:
    torch.rand(3), random.random(), np.random.rand(2)
    torch.rand(2, generator=model.generator), model.own_random.random(), model.numpy_random.random()


def _set_storage(model: Writer, _: Tensor) -> None:
    model.mean.set_(torch.zeros(7))
    model.plain.resize_(9).fill_(1)


def _flags(model: Writer, _: Tensor) -> None:
    model.scale.requires_grad_(False)
    model.layer.train()
    model.train()


# What is written, whatever the samples are: outputs stay a function of each sample.
WRITES: dict[str, Callable[[Writer, Tensor], object]] = {
    "data of a parameter": lambda m, x: m.scale.data.copy_(torch.zeros(WIDTH)),
    "data set": lambda m, x: setattr(m.scale, "data", torch.zeros(WIDTH)),
    "data of a buffer": lambda m, x: m.mean.data.add_(1.0),
    "buffer set": lambda m, x: setattr(m, "mean", m.mean + 1),
    "hidden buffer": lambda m, x: m.hidden.mul_(2),
    "absent buffer": lambda m, x: setattr(m, "absent", torch.ones(2)),
    "copy without gradients": _copy_without_grad,
    "clipped weight": _clip,
    "by numpy": lambda m, x: m.scale.detach().numpy().fill(0.0),
    "negative zero": lambda m, x: m.plain.zero_().neg_(),
    "plain tensor": lambda m, x: m.plain.fill_(0.0),
    "tensor through a view": lambda m, x: m.view.fill_(0.0),
    "sparse tensor": lambda m, x: m.sparse._values().zero_(),
    "flag": lambda m, x: setattr(m, "flag", True),
    "counter": lambda m, x: setattr(m, "count", m.count + 1),
    "cache": lambda m, x: setattr(m, "cache", 2 * m.layer.weight),
    "last input": lambda m, x: setattr(m, "cache", x),
    "new attribute": lambda m, x: setattr(m, "new", x),
    "nested list": lambda m, x: m.table["deep"]["list"][1].append(x),
    "nested tensor": lambda m, x: m.table["deep"]["list"][1][1].zero_(),
    "new key": lambda m, x: m.table.update(x=x),
    "empty list": lambda m, x: m.items.append(x),
    "inside a tuple": lambda m, x: (m.pair[0].append(1), m.pair[1]["a"].fill_(2)),
    "set": lambda m, x: (m.chosen.discard(1), m.chosen.add(9)),
    "array": lambda m, x: m.array.fill(0.0),
    "namespace": lambda m, x: setattr(m.namespace, "last", x),
    "slots": lambda m, x: (setattr(m.namespace.inner, "best", 1), m.namespace.inner.values.clear()),
    "attribute of a parameter": lambda m, x: setattr(m.scale, "norm", 1.0),
    "parameter replaced": _retie,
    "removed": _remove,
    "gradients": _gradients,
    "generators": _draw,
    "storage": _set_storage,
    "flags": _flags,
    "grown storage": lambda m, x: m.hidden.untyped_storage().resize_(0),
    "hook": lambda m, x: m.layer.register_forward_hook(lambda *_: None),
    "submodule": lambda m, x: m.add_module("more", nn.Linear(2, 2)),
}


READERS: dict[type, Callable[[Any], object]] = {
    np.ndarray: lambda array: array.tobytes(),
    torch.Generator: lambda generator: generator.get_state().tolist(),
    random.Random: lambda generator: generator.getstate(),
    np.random.Generator: lambda generator: repr(generator.bit_generator.state),
    set: sorted,
}


def held(value: Any, seen: dict[int, str] | None = None, path: str = "") -> Any:
    """What a value leads to, with bits and identities, as nested tuples."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return ("as", seen[id(value)])
    if isinstance(value, Tensor):
        return _tensor(value, seen, path)
    for kind, read in READERS.items():
        if isinstance(value, kind):
            return id(value), read(value)
    if isinstance(value, (nn.Module, types.SimpleNamespace, dict)):
        seen[id(value)] = path
        table = value if isinstance(value, dict) else vars(value)
        return id(value), [(k, held(v, seen, f"{path}.{k}")) for k, v in table.items()]
    if not isinstance(value, (list, tuple, Slotted)):
        return type(value), repr(value)
    slots = [getattr(value, n) for n in value.__slots__] if isinstance(value, Slotted) else value
    return id(value), [held(v, seen, f"{path}[{i}]") for i, v in enumerate(slots)]


def _tensor(tensor: Tensor, seen: dict[int, str], path: str) -> Any:
    seen[id(tensor)] = path
    flags = tensor.requires_grad, tensor.is_leaf, vars(tensor)
    if tensor.layout is not torch.strided:
        parts = tensor._indices(), tensor._values()
        return id(tensor), flags, [(t.data_ptr(), t.tolist()) for t in parts]
    storage = tensor.untyped_storage()
    where = storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    size = storage.nbytes()
    content = tensor.detach().clone().numpy().tobytes() if size else b""  # numpy would own it
    grad = None if not tensor.is_leaf or tensor.grad is None else tensor.grad
    return (
        id(tensor),
        flags,
        where,
        size,
        content,
        grad is None or _tensor(grad, seen, path + ".grad"),
    )


def process_state() -> Any:
    """The generators of the process, and torch's modes."""
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
    numpy_state = repr(np.random.get_state(legacy=False))
    return modes, torch.get_rng_state().tolist(), random.getstate(), numpy_state
