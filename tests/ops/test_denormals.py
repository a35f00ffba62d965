"""Which threads round denormals to zero."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lipfast.ops.denormals import denormals_flushed

# A thread of the pool keeps the mode that its creator had when it began.
IN_THE_POOL_ALONE = """
import torch
from lipfast.ops.denormals import denormals_flushed
torch.set_num_threads(1)
print(denormals_flushed())
if torch.set_flush_denormal(True):
    torch.set_num_threads(2)
    torch.ones(1 << 17).mul_(2.0)
    torch.set_flush_denormal(False)
    print(denormals_flushed())
    torch.set_num_threads(1)
    print(denormals_flushed())
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_the_calling_thread(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert not denormals_flushed()
        if torch.set_flush_denormal(True):
            assert denormals_flushed()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def test_a_thread_of_the_pool() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IN_THE_POOL_ALONE], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() in (["False"], ["False", "True", "False"])
