"""Scoring on a device in pretence: which one, how checkpoints get there, what may go wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lipfast import _native
from lipfast.errors import ArgumentError
from lipfast.scoring import device as devices
from lipfast.scoring import read_scores, score, scorer
from lipfast.scoring.device import DeviceLostError, find_device
from lipfast.scoring.single import bound_checkpoint
from tests.support import pretended_device as pretence
from tests.support.pretended_device import pretended_device
from tests.support.toy_archive import toy_state, write_toy


@pytest.fixture
def arguments(toy_models, archive, samples, tmp_path) -> dict[str, Any]:
    return {"archive": archive, "arch": toy_models, "data": samples, "out": tmp_path / "s"}


@pytest.fixture
def many(tmp_path) -> Path:
    """Sixteen checkpoints of one width."""
    for step in range(16):
        write_toy(tmp_path / "many" / f"step{step}.safetensors", 4, seed=step, step=step)
    return tmp_path / "many"


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in read_scores(folder).to_pylist()}


# Which device


def test_the_device_is_found_by_its_name() -> None:
    assert find_device("cpu").is_cpu
    with pretended_device(pretence.Device(count=2)):
        assert [find_device(name).place.index for name in ("cuda", "cuda:1", "auto")] == [0, 1, 0]
        assert find_device("cuda:1").note == "cuda:1 (pretended)"
        # torch itself takes the last ones for cuda and for cuda:0.
        for name in ("cuda:7", "cuda:128", "cuda:255", "cuda:256"):
            with pytest.raises(
                ArgumentError, match=r"no such device; there are cuda:0 to cuda:1\."
            ):
                find_device(name)


@pytest.mark.parametrize(
    "name", ["gpu", "", "cuda:x", "cuda:-1", "mps", "xpu:0", "meta", "cpu:1", "None"]
)
def test_other_names_are_refused(name: str) -> None:
    with pretended_device(), pytest.raises(ArgumentError, match="expected cpu, cuda, cuda:1"):
        find_device(name)


def without_cuda(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.version, "cuda", None)


def hidden(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.setattr(torch.cuda, "is_available", lambda: False)


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_native, "_cuda_info", None)
    patch.setattr(_native, "_cuda_reason", "built without CUDA")


def old_driver(patch: pytest.MonkeyPatch) -> None:
    def refuse(*sizes: int, **options: Any) -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nPlease update")

    patch.setattr(torch, "ones", refuse)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (without_cuda, "was built without CUDA"),
        (hidden, "no CUDA device: CUDA_VISIBLE_DEVICES is ''"),
        (without_kernels, "no CUDA kernels: built without CUDA"),
        (old_driver, "it cannot be used (The NVIDIA driver on your system is too old)"),
    ],
)
def test_a_device_that_cannot_be_used_says_why(
    monkeypatch, broken: Callable[[pytest.MonkeyPatch], None], reason: str
) -> None:
    with pretended_device(), monkeypatch.context() as patch:
        broken(patch)
        with pytest.raises(ArgumentError) as caught:
            find_device("cuda")
        found = find_device("auto")
    assert reason in str(caught.value)
    assert found.is_cpu
    assert reason in found.note


def test_memory_is_that_of_the_device_where_it_is_less() -> None:
    with pretended_device(pretence.Device(free=1000)):
        cuda = find_device("cuda")
        assert (cuda.memory(1 << 30), cuda.memory(100)) == (500, 100)
        assert (cuda.batch(64, 10), cuda.batch(64, 1), cuda.batch(64, 10**6)) == (12, 64, 1)
    assert find_device("cpu").memory(1 << 30) == 1 << 30


def test_a_device_of_torch_is_taken_as_its_name(arguments, archive) -> None:
    assert score(**arguments, device=torch.device("cpu"), limit=1).device == "cpu"
    one = {"arch": arguments["arch"], "data": arguments["data"]}
    path = next(archive.rglob("*.safetensors"))
    assert bound_checkpoint(path, **one, device=torch.device("cpu"))[1]
    with pretended_device(pretence.Device(count=2)):
        found = score(**arguments, device=torch.device("cuda", 1), limit=1)
        with pytest.raises(ArgumentError, match="device 'None': expected cpu"):
            score(**{**arguments, "device": None})
    assert found.device == "cuda:1 (pretended)"


# What is computed


def test_scores_are_those_of_the_cpu_and_one_store_goes_on_on_either(arguments, tmp_path) -> None:
    with pretended_device():
        summary = score(**arguments, device="cuda", limit=7, batch_size=4)
    assert (summary.scored, summary.failed) == (7, 0)
    assert "device: cuda:0 (pretended)" in str(summary)
    assert summary.to_dict()["device"] == "cuda:0 (pretended)"
    rest = score(**arguments)
    assert (rest.scored, rest.skipped) == (5, 7)
    assert "device" not in str(rest)
    ours = rows_of(tmp_path / "s")
    score(**{**arguments, "out": tmp_path / "cpu"})
    for uri, expected in rows_of(tmp_path / "cpu").items():
        row = ours[uri]
        assert (row["status"], row["fingerprint"]) == ("ok", expected["fingerprint"])
        for name in ("upper", "lower", "jacobian_max", "mean", "rms"):
            assert row[name] == pytest.approx(expected[name], rel=2e-6)
        assert row["upper_certified"]
        assert row["lower"] <= row["upper"]


def test_a_batch_is_one_copy(arguments, many) -> None:
    with pretended_device() as counts:
        score(**{**arguments, "archive": many}, device="cuda", batch_size=4)
    assert read_scores(arguments["out"])["status"].to_pylist() == ["ok"] * 16
    # Of each batch its numbers and the order of its matrices; once the samples, which are awaited.
    assert (counts.copies, counts.blocking) == (2 * 4 + 1, 1)


def test_one_checkpoint_of_a_batch_fails_as_it_does_alone(arguments, archive, tmp_path) -> None:
    bad = toy_state(4)
    bad["0.weight"][1, 2] = float("nan")
    save_file(bad, archive / "w4s0" / "nan.safetensors", metadata={"width": "4"})
    small = {name: tensor[:2] for name, tensor in toy_state(4).items()}
    save_file(small, archive / "w4s1" / "small.safetensors", metadata={"width": "4"})
    half = {name: tensor.half() for name, tensor in toy_state(6).items()}
    save_file(half, archive / "w6s0" / "half.safetensors", metadata={"width": "6"})
    with pretended_device():
        summary = score(**arguments, device="cuda")
    assert (summary.scored, summary.failed) == (13, 2)
    score(**{**arguments, "out": tmp_path / "cpu"})
    ours, others = rows_of(tmp_path / "s"), rows_of(tmp_path / "cpu")
    for uri, row in others.items():
        for name in ("status", "error", "kind", "run"):
            assert ours[uri][name] == row[name], uri


def test_of_checkpoints_alone_too(archive, toy_models, samples) -> None:
    path = archive / "w4s0" / "step1.safetensors"
    _, here = bound_checkpoint(path, arch=toy_models, data=samples)
    with pretended_device():
        _, there = bound_checkpoint(path, arch=toy_models, data=samples, device="cuda")
    assert there.upper.value == pytest.approx(here.upper.value, rel=2e-6)


# What may go wrong


def failing(
    patch: pytest.MonkeyPatch, problem: Callable[[Sequence[Any]], Exception | None]
) -> list[int]:
    """Bounds of batches fail where `problem` says so; returns the sizes that were tried."""
    genuine, sizes = scorer.batch_bounds, []

    def bounds(plan: Any, state_dicts: Sequence[Any], *given: Any, **options: Any) -> Any:
        sizes.append(len(state_dicts))
        error = problem(state_dicts)
        if error is not None:
            raise error
        return genuine(plan, state_dicts, *given, **options)

    patch.setattr(scorer, "batch_bounds", bounds)
    return sizes


def holds(state_dict: Any, width: int) -> bool:
    """Whether it is that of seed 1 of this width."""
    weight = state_dict["0.weight"].cpu()
    return len(weight) == width and torch.equal(weight, toy_state(width, seed=1)["0.weight"])


def test_out_of_memory_halves_this_batch_and_later_ones(arguments, many, monkeypatch) -> None:
    def lacking(batch: Sequence[Any]) -> Exception | None:
        return torch.OutOfMemoryError("CUDA out of memory. Tried ...") if len(batch) > 2 else None

    with pretended_device():
        sizes = failing(monkeypatch, lacking)
        summary = score(**{**arguments, "archive": many}, device="cuda", batch_size=4)
    assert summary.scored == 16
    # Two batches are on their way already when the first one fails.
    assert sizes == [4, 2, 2] * 3 + [2, 2]


def test_what_does_not_fit_alone_is_a_row(arguments, monkeypatch) -> None:
    def lacking(batch: Sequence[Any]) -> Exception | None:
        met = any(holds(entry, 4) for entry in batch)
        return torch.OutOfMemoryError("CUDA out of memory") if met else None

    with pretended_device(pretence.Device(free=5 << 20)):
        failing(monkeypatch, lacking)
        summary = score(**arguments, device="cuda")
    assert (summary.scored, summary.failed) == (9, 3)
    assert summary.reasons == {"too large for the device's memory": 3}
    example = next(iter(summary.examples.values()))
    assert "takes more memory than cuda:0 has (5 MiB are free; CUDA out of memory)" in example


def test_a_lost_device_ends_the_run_and_what_was_done_is_kept(arguments, monkeypatch) -> None:
    lost = []

    def breaking(batch: Sequence[Any]) -> Exception | None:
        lost.append(batch)
        if len(lost) < 3:
            return None
        monkeypatch.setattr(devices.torch, "ones", breaks)
        return RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be")

    def breaks(*sizes: int, **options: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    with pretended_device():
        failing(monkeypatch, breaking)
        with pytest.raises(
            DeviceLostError, match=r"cuda:0 was lost \(CUDA error: unspecified"
        ) as e:
            score(**arguments, device="cuda", batch_size=2)
        assert "What was scored before is kept" in str(e.value)
    monkeypatch.undo()
    assert read_scores(arguments["out"])["status"].to_pylist() == ["ok"] * 4


def test_a_failure_of_one_checkpoint_is_not_the_device_s(arguments, monkeypatch) -> None:
    def unlucky(batch: Sequence[Any]) -> Exception | None:
        met = any(holds(entry, 6) for entry in batch)
        return RuntimeError("CUDA error: invalid configuration argument") if met else None

    with pretended_device():
        failing(monkeypatch, unlucky)
        summary = score(**arguments, device="cuda")
    assert (summary.scored, summary.failed, summary.reasons) == (9, 3, {"RuntimeError": 3})


def test_ctrl_c_on_a_device_keeps_what_was_done(arguments) -> None:
    def press(progress: Any) -> None:
        raise KeyboardInterrupt

    with pretended_device(), pytest.raises(KeyboardInterrupt):
        score(**arguments, device="cuda", batch_size=2, progress=press)
    done = read_scores(arguments["out"]).num_rows
    assert 0 < done < 12
    assert score(**arguments).skipped == done


def test_a_dry_run_on_a_device(arguments) -> None:
    with pretended_device():
        summary = score(**arguments, device="cuda", dry_run=True)
    assert (summary.scored, summary.failed) == (12, 0)
    assert summary.estimate > 0
    assert not arguments["out"].exists()
