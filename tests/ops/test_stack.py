"""Rows of one tensor are recognised, converted together, and never copied without need."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lipfast.errors import ArgumentError
from lipfast.ops.chain_secants import PiecewiseLinearChains
from lipfast.ops.chain_stages import Linear
from lipfast.ops.stack import converted, rows_of_one, stacked

WHOLE = torch.arange(24.0).reshape(4, 3, 2)
COMPLEX = torch.complex(WHOLE, WHOLE + 0.5)
ROWS: dict[str, list[Tensor]] = {
    "rows": list(WHOLE.unbind()),
    "every second": list(WHOLE[::2].unbind()),
    "one": [WHOLE[1]],
    "transposed": [row.mT for row in WHOLE],
    "the same": [WHOLE[2]] * 3,
    "negated": list(COMPLEX.conj().imag.unbind()),
    "overlapping": [WHOLE.flatten()[i : i + 5] for i in range(3)],
}
OTHERS: dict[str, list[Tensor]] = {
    "backwards": list(WHOLE.unbind())[::-1],
    "unevenly spaced": [WHOLE[0], WHOLE[1], WHOLE[3]],
    "of two tensors": [WHOLE[0], WHOLE.clone()[1]],
    "one of them turned": [WHOLE[0, :2], WHOLE[1, :2].mT],
    "of two types": [WHOLE[0], WHOLE[1].double()],
    "one of them negated": [COMPLEX.imag[0], COMPLEX.conj().imag[1]],
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_recognised(name: str) -> None:
    tensors = ROWS[name]
    whole = rows_of_one(tensors)
    assert whole is not None and torch.equal(whole, torch.stack(tensors))
    assert whole.data_ptr() == tensors[0].data_ptr() == stacked(tensors).data_ptr()
    for one, other in zip(converted(tensors, torch.float64), tensors, strict=True):
        assert one.is_contiguous() and torch.equal(one, other.double())


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_rows(name: str) -> None:
    tensors = OTHERS[name]
    assert rows_of_one(tensors) is None
    for one, other in zip(converted(tensors, torch.float16), tensors, strict=True):
        assert one.is_contiguous() and torch.equal(one, other.half())
    dtypes = {tensor.dtype for tensor in tensors}
    expected = torch.stack(tensors)
    assert torch.equal(stacked(tensors), expected)
    assert stacked(tensors).dtype == (torch.float64 if len(dtypes) > 1 else WHOLE.dtype)


def test_integers_beside_others_are_not_rounded_to_float32() -> None:
    tensors = [torch.tensor([2**24 + 1]), torch.tensor([0.5])]
    assert stacked(tensors).tolist() == [[2.0**24 + 1], [0.5]]


def test_nothing_is_done_without_need() -> None:
    tensors = [torch.ones(2, requires_grad=True), torch.zeros(2)]
    assert converted(tensors, torch.float32) is tensors
    assert not stacked(tensors).requires_grad
    assert not converted(tensors, torch.float64)[0].requires_grad


def test_secants_of_a_device_are_not_asked_of_the_cpu() -> None:
    chains = PiecewiseLinearChains([[torch.eye(2)]], [[None]], [Linear()])
    with pytest.raises(ArgumentError, match="points: the networks are on cpu; this is for cuda"):
        chains.points(torch.ones(1, 2), 2, (0.5,), (1.0,), 100.0)
    with pytest.raises(ArgumentError, match="best_quotients: the networks are on cpu"):
        chains.best_quotients(torch.ones(1, 3, 2), 2, 0.99)
