"""Stretches of small operations on one thread."""

from __future__ import annotations

import pytest
import torch

import lipfast
from lipfast.ops.threads import native_op, native_ops_alone, native_workers, one_thread


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_is_restored_after_errors_too():
    with pytest.raises(ValueError, match="broken"), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError("broken")
    assert torch.get_num_threads() == 3


def test_bounds_leave_the_number_of_threads_as_it_was():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    plan = lipfast.compile(model, torch.zeros(2, 4))
    found = plan.bounds([model.state_dict()] * 2, torch.ones(3, 4))
    assert torch.get_num_threads() == 3
    with pytest.raises(lipfast.LipfastError):
        plan.upper([model.state_dict(), {}])
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    alone = plan.bounds([model.state_dict()] * 2, torch.ones(3, 4))
    assert [b.lower.value for b in alone] == [b.lower.value for b in found]


def test_between_native_ops_one_thread_works_and_in_them_all():
    with native_ops_alone():
        assert (torch.get_num_threads(), native_workers()) == (1, 3)
        with native_op():
            assert torch.get_num_threads() == 3
        assert torch.get_num_threads() == 1
        with native_ops_alone():  # nested, it is the outer count that ops have
            assert native_workers() == 3
    assert (torch.get_num_threads(), native_workers()) == (3, 3)


def test_bounds_are_the_same_whichever_threads_work_between_the_ops():
    model = torch.nn.Sequential(torch.nn.Linear(40, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    plan = lipfast.compile(model, torch.zeros(2, 40))
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    before = plan.bounds([model.state_dict()] * 9, x)
    with native_ops_alone():
        within = plan.bounds([model.state_dict()] * 9, x)
    assert within == before
