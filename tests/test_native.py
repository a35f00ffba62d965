from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

import lipfast
from lipfast import _native
from lipfast.errors import ArgumentError


def test_the_default_capability_always_runs() -> None:
    assert _native.available_capabilities()[0] == "default"
    assert _native.capability() in _native.available_capabilities()


def test_a_forced_capability_is_given_back() -> None:
    before = _native.capability()
    with _native.forced_capability("default"):
        assert _native.capability() == "default"
    assert _native.capability() == before
    with (
        pytest.raises(ArgumentError, match=r"'neon'.*choose one of: default"),
        _native.forced_capability("neon"),
    ):
        pass


def capability_with(environment: str) -> subprocess.CompletedProcess[str]:
    script = "import lipfast; print(lipfast.info()['capability'])"
    return subprocess.run(
        [sys.executable, "-c", script],
        env={"LIPFAST_CPU_CAPABILITY": environment, "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses() -> None:
    assert capability_with("default").stdout == "default\n"
    refused = capability_with("sse9")
    assert refused.returncode != 0
    assert "LIPFAST_CPU_CAPABILITY" in refused.stderr and "choose one of" in refused.stderr


def test_what_is_built_and_what_is_there_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "_cuda_info", {"nvcc": "nvcc 13.0", "architectures": "9.0"})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = lipfast.info()
    assert found.kernels == ("cpu", "cuda") and found.cuda == "nvcc 13.0, 9.0"
    assert found.devices == ("cpu",) and found.no_cuda_device == "no CUDA device"
    assert "devices     cpu (no CUDA device)\n" in str(found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(_native, "_cuda_info", None)
    monkeypatch.setattr(_native, "_cuda_reason", "built without CUDA")
    found = lipfast.info()
    assert found.kernels == ("cpu",) and found.cuda == "built without CUDA"
    assert found.devices == ("cpu", "cuda:0 GPU 0", "cuda:1 GPU 1")
    assert found.no_cuda_device is None


def test_a_torch_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native.no_cuda_device() == (
        f"no CUDA device: torch {torch.__version__} was built without CUDA"
    )


def test_kernels_that_do_not_find_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = ModuleType("_C_cuda")
    for bound, version, refused in [(False, "13.0", True), (True, "13.0", False)]:
        monkeypatch.setattr(extension, "bound_to_torch", lambda bound=bound: bound, raising=False)
        monkeypatch.setattr(torch.version, "cuda", version)
        assert (_native._not_bound(extension) is not None) == refused
    monkeypatch.setattr(extension, "bound_to_torch", lambda: False)
    assert "was not found, or lacks what lipfast._C_cuda calls" in str(
        _native._not_bound(extension)
    )
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native._not_bound(extension) is None


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_devices_are_named(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = str(_native.no_cuda_device())
    assert found.startswith(f"no CUDA device: CUDA_VISIBLE_DEVICES is {hidden!r}")


def test_a_driver_that_does_not_do_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\n")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "driver on your system is too old (found version 12040)" in str(_native.no_cuda_device())
