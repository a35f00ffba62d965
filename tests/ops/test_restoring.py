"""What is changed for a while is put back, wherever Ctrl-C comes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch

from lipfast.estimators.jacobian.function import differentiating
from lipfast.ops.modes import forward_mode, plain_arithmetic
from lipfast.ops.restoring import Modes, Restoring
from lipfast.ops.threads import _WORKERS, native_ops_alone, threads
from tests.support.interrupts import InterruptedAt

FILES = ("restoring.py", "modes.py", "threads.py", "function.py")
BLOCKS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "plain_arithmetic": plain_arithmetic,
    "forward_mode": forward_mode,
    "differentiating": differentiating,
    "threads": lambda: threads(3),
    "native ops": native_ops_alone,
}


def modes() -> tuple[object, ...]:
    kept = Modes(attention=True)
    workers = _WORKERS.get()
    return (kept._modes, kept._depth, id(kept._filters), kept._attention, workers)


def interrupted(block: Callable[[], AbstractContextManager[None]], *numbers: int) -> InterruptedAt:
    with InterruptedAt(FILES, numbers) as trace:
        try:
            with block():
                pass
        except KeyboardInterrupt:
            assert trace.raised
        else:
            assert not trace.raised, "the interrupt was lost"
    return trace


@pytest.mark.parametrize("name", BLOCKS)
def test_interrupts_at_any_line(name: str) -> None:
    before = modes()
    total = interrupted(BLOCKS[name]).lines
    assert total > 10
    for number in range(1, total + 1):
        for numbers in ((number,), (number, number + 1), (number, number + 3)):
            assert interrupted(BLOCKS[name], *numbers).raised
            assert modes() == before, numbers


def test_it_runs_once_and_says_what_fails() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("cannot be put back")

    with pytest.raises(ValueError, match="cannot be put back"), Restoring(fail):
        pass
    undo = Restoring(lambda: calls.append(2))
    with undo, undo, undo:
        assert calls == [1]
    assert calls == [1, 2]


def test_modes_that_a_block_sets() -> None:
    before = modes()
    undo = Restoring(Modes(attention=True).restore)
    with undo:
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_autocast_enabled("cpu", True)
        torch.backends.cuda.enable_flash_sdp(not torch.backends.cuda.flash_sdp_enabled())
        torch.device("meta").__enter__()
        warnings.filters = [("ignore", None, Warning, None, 0)]  # type: ignore[assignment]
        assert modes() != before
    assert modes() == before
    assert torch.ones(1).device.type == "cpu"
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", stacklevel=1)
