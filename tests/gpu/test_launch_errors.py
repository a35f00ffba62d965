"""What is said where the device, the driver or the memory does not do; the stub makes them so."""

from __future__ import annotations

import re

import pytest
import torch

import lipfast
from lipfast.ops.jacobian_reduction import jacobian_reduction

pytestmark = pytest.mark.stub


@pytest.fixture
def jacobian(device: torch.device) -> torch.Tensor:
    return torch.eye(3, 4, dtype=torch.float64).expand(2, 3, 4).contiguous().to(device)


def refused(jacobian: torch.Tensor) -> str:
    with pytest.raises(RuntimeError) as caught:
        jacobian_reduction(jacobian)
    return str(caught.value)


def test_a_device_too_old(jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPFAST_STUB_CAPABILITY", "75")
    message = refused(jacobian)
    assert "jacobian_reduction: no kernel of this build runs on the device" in message
    assert "compute capability is 7.5: lipfast needs 8.0 or later" in message


def test_an_image_that_was_not_built(
    jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPFAST_STUB_ERROR", "209")
    message = refused(jacobian)
    assert "compute capability is 9.0 ('lipfast info' lists what was built" in message
    assert "build again with TORCH_CUDA_ARCH_LIST=9.0" in message


def test_a_driver_older_than_the_runtime(
    jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPFAST_STUB_DRIVER", "12040")
    message = refused(jacobian)
    assert "the driver is for CUDA 12.4, these kernels were built with CUDA 13.0" in message
    assert "update the driver" in message
    monkeypatch.setenv("LIPFAST_STUB_DRIVER", "0")
    assert "there is no CUDA driver" in refused(jacobian)


@pytest.mark.parametrize("code", [2, 701, 720, 1])
def test_too_few_resources(
    code: int, jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPFAST_STUB_ERROR", str(code))
    message = refused(jacobian)
    assert re.search(r" of \d+ threads, \d+ bytes of shared memory each", message)
    assert ("3 MiB of 81920 MiB are free" in message) == (code == 2)


def test_shared_memory_that_the_device_lacks(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPFAST_STUB_SHARED", "50000")
    message = refused(torch.eye(64, 64, dtype=torch.float64, device=device)[None])
    assert re.search(r"a block needs \d+ bytes of shared memory, the device has 50000", message)


def test_workspace_beyond_the_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.eye(40, dtype=torch.float64, device=device)
    monkeypatch.setenv("LIPFAST_STUB_MEMORY", "4096")
    with pytest.raises(RuntimeError, match=r"out of memory on cuda:0: \d+ bytes of workspace"):
        lipfast.spectral_norms([matrix], certify=False)


def test_an_error_of_earlier_work(jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPFAST_STUB_ERROR", "700")
    message = refused(jacobian)
    assert "an illegal memory access was encountered (cudaErrorIllegalAddress)" in message
    assert "or at earlier work on the device" in message


def test_an_error_is_over_once_it_was_raised(
    jacobian: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIPFAST_STUB_ERROR", "701")
    refused(jacobian)
    monkeypatch.delenv("LIPFAST_STUB_ERROR")
    assert jacobian_reduction(jacobian)[0].tolist() == [1, 1]


def test_tensors_on_two_devices() -> None:
    first, second = (torch.eye(3, 4, device=f"cuda:{index}") for index in range(2))
    with pytest.raises((RuntimeError, ValueError), match=r"matrix 1.*cuda"):
        lipfast.spectral_norms([first, second])
