"""Lines that read the values of samples."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import TraceError
from lipfast.plan.values_read import ValuesRead

X = torch.linspace(-1, 1, 12).reshape(4, 3)


@torch.jit.script
def scripted(x: Tensor) -> bool:
    return bool((x > 100).any())


def unseen(x: Tensor) -> object:
    with torch._C.DisableTorchFunction():
        return bool((x > 100).any())


def in_a_hook(x: Tensor) -> None:
    start = x.detach().clone().requires_grad_()
    doubled = start * 2
    doubled.register_hook(lambda gradient: None if bool((gradient > 100).any()) else gradient)
    (doubled**2).sum().backward()


READ: dict[str, Callable[[Tensor], object]] = {
    "bool": lambda x: bool((x > 100).any()),
    "float": lambda x: float(x.max()),
    "item": lambda x: x.max().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "asarray": lambda x: np.asarray(x.detach()),
    "in": lambda x: 100.0 in x,
    "equal": lambda x: torch.equal(x, -x),
    "allclose": lambda x: x.allclose(-x),
    "an overload": lambda x: torch.ops.aten.equal.default(x, x),
    "where": lambda x: torch.where(x > 100)[0],
    "nonzero": lambda x: (x > 100).nonzero(),
    "unique": lambda x: x.sign().unique(),
    "a mask": lambda x: x[x > 100],
    "maximum": lambda x: max(x[0]),
    "a copy": lambda x: float(torch.zeros(3).copy_(x[0]).max()),
    "a part": lambda x: [part for part in x.unbind(1) if part[0] > 0],
    "storage": lambda x: x.untyped_storage()[0],
    "memory": lambda x: ctypes.c_float.from_address(x.data_ptr()).value,
    "sparse": lambda x: x.relu().to_sparse(),
    "a file": lambda x: torch.save(x, io.BytesIO()),
}
ELSEWHERE = {"unseen by functions": unseen, "TorchScript": scripted, "a hook": in_a_hook}
NOT: dict[str, Callable[[Tensor], object]] = {
    "shape": lambda x: (x.shape, len(x), x.dim(), x.dtype, x.is_floating_point(), x.stride()),
    "others": lambda x: float(torch.ones(3).sum()) + bool(torch.zeros(x.shape).any()),
    "where": lambda x: torch.where(x > 0, x, 0),
    "an index": lambda x: x[:, torch.tensor([True, False, True])],
    "a mask": lambda x: x.clone().__setitem__(x < 0, 0.0),
    "attention": lambda x: nn.MultiheadAttention(3, 1, batch_first=True)(x, x, x),
}


@pytest.mark.parametrize("function", READ.values(), ids=READ)
def test_the_line_is_found(function: Callable[[Tensor], object]) -> None:
    with ValuesRead([X]) as found:
        function(X)
    file, _, line = found.at.rpartition(":")
    assert file == __file__
    assert Path(file).read_text().splitlines()[int(line) - 1].lstrip().startswith('"')


@pytest.mark.parametrize("function", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_line_is_found_where_functions_are_not_seen(
    function: Callable[[Tensor], object],
) -> None:
    with torch.enable_grad(), ValuesRead([X]) as found:
        function(X)
    assert found.at.startswith(f"{__file__}:")


@pytest.mark.parametrize("function", NOT.values(), ids=NOT)
def test_nothing_is_read(function: Callable[[Tensor], object]) -> None:
    with ValuesRead([X]) as found:
        function(X)
    assert found.at == ""


def test_a_model_that_tries_to_is_refused() -> None:
    """Its trace fails inside, and no sample that is tried goes beyond the limit."""

    class Trying(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            try:
                large = bool((x.abs() > 1e6).any())
            except Exception:  # of the trace
                large = False
            return 3 * x if large else x

    with pytest.raises(TraceError, match=r"Trying reads values of its samples \(at .*py:\d+\)"):
        lipfast.upper_bound(Trying(), X)
