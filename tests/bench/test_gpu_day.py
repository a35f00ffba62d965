"""The run on a machine with a GPU, without one: time, failures, large files."""

from __future__ import annotations

import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import lipfast
from bench import gpu_against_torch, gpu_day
from bench.gpu_day import Outcome, Step, go, packed, steps

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


def python(code: str, name: str = "a", seconds: float = 60, **more: object) -> Step:
    return Step(name, (sys.executable, "-c", code), seconds, **more)  # type: ignore[arg-type]


def said(outcomes: list[Outcome]) -> list[str]:
    return [outcome.said for outcome in outcomes]


def test_the_limits_of_all_steps_fit_into_the_run(tmp_path: Path) -> None:
    total = sum(step.seconds for step in steps(tmp_path))
    assert total <= 60 * gpu_day.MINUTES - gpu_day.PACKING


def test_what_decides_comes_first_and_the_files_that_steps_name_are_there(tmp_path: Path) -> None:
    found = steps(tmp_path)
    assert [step.name for step in found][:4] == ["build", "symbols", "tests", "against-torch"]
    assert [step.required for step in found] == [True, True] + [False] * (len(found) - 2)
    root = Path(__file__).parents[2]
    for step in found:
        words = step.command
        named = [word for word in words if word.endswith(".py") or word.startswith("tests/")]
        modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m"]
        named += [f"{m.replace('.', '/')}.py" for m in modules if m.startswith("bench.")]
        assert named, step
        assert all((root / name).exists() for name in named), step


def test_a_failure_leaves_its_log_and_the_others_go_on(tmp_path: Path) -> None:
    outcomes = go(
        [
            python("print('first'); raise SystemExit(3)", "one"),
            python("print('second')", "two"),
            Step("three", ("nothing",), 9, program="no-such-program"),
        ],
        tmp_path,
        60,
        ENVIRONMENT,
    )
    assert said(outcomes) == [
        "failed with code 3",
        "passed",
        "left out: no-such-program is not installed",
    ]
    assert (tmp_path / "one.log").read_text() == "first\n"


def test_nothing_follows_a_required_step_that_fails(tmp_path: Path) -> None:
    outcomes = go(
        [python("raise SystemExit(1)", required=True), python("", "b")], tmp_path, 60, ENVIRONMENT
    )
    assert said(outcomes) == ["failed with code 1"]


def test_a_step_that_hangs_is_stopped_with_its_children_and_the_time_is_kept(
    tmp_path: Path,
) -> None:
    child = "import subprocess, sys; print('begun', flush=True); "
    child += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
    started = time.monotonic()
    outcomes = go(
        [python(child, "one", 2), python("print(1)", "two", 9)], tmp_path, 1.5, ENVIRONMENT
    )
    # Far below the child's 100 s, and above what a busy machine adds.
    assert time.monotonic() - started < 50
    assert outcomes[0].said.startswith("stopped after")
    assert said(outcomes)[1] == "left out: no time was left"


def runs(status: Path) -> bool:
    """Whether the process of a /proc/.../status runs; nobody may have waited for a dead one."""
    try:
        lines = status.read_text().split("\n")
    except OSError:
        return False
    return not any(line.startswith(("State:\tZ", "State:\tX")) for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_step_and_its_children_and_what_there_is_is_packed(
    tmp_path: Path, number: signal.Signals
) -> None:
    code = "import os, subprocess, sys, time; "
    code += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
    code += f"print(child.pid, flush=True); os.kill(os.getppid(), {number.value}); time.sleep(100)"
    kept = {each: signal.signal(each, gpu_day._interrupt) for each in gpu_day._ENDS}
    started = time.monotonic()
    try:
        todo = [python("", "one"), python(code, "two"), python("", "three")]
        outcomes = go(todo, tmp_path, 200, ENVIRONMENT)
    finally:
        for each, handler in kept.items():
            signal.signal(each, handler)
    assert time.monotonic() - started < 50
    assert said(outcomes) == ["passed", "interrupted"]
    status = Path(f"/proc/{(tmp_path / 'two.log').read_text().strip()}/status")
    while runs(status) and time.monotonic() - started < 90:  # it would sleep for 100 seconds
        time.sleep(0.01)
    assert not runs(status)
    with tarfile.open(packed(tmp_path, outcomes)) as tar:
        assert tar.getnames() == ["one.log", "summary.tsv", "two.log"]


def test_what_lies_in_the_folder_is_neither_packed_nor_cut(tmp_path: Path) -> None:
    (tmp_path / "theirs.log").write_bytes(bytes(3 << 20))
    (tmp_path / "b.log").write_text("of another run")
    steps = [python("print(1)"), Step("b", ("nothing",), 9, program="no-such-program")]
    outcomes = go(steps, tmp_path, 60, ENVIRONMENT)
    with tarfile.open(packed(tmp_path, outcomes)) as tar:
        assert tar.getnames() == ["a.log", "summary.tsv"]
    assert (tmp_path / "theirs.log").stat().st_size == 3 << 20


@pytest.mark.parametrize(
    "words",
    [
        *(["--minutes", value] for value in ("0", "-3", "nan", "inf", "ten")),
        *(["--only", "nothing"], ["--only"], ["--out", f"{__file__}/below"]),
    ],
)
def test_wrong_arguments_are_refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "missing", lambda: None)
    monkeypatch.setattr(gpu_day, "go", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        gpu_day.main(words)
    assert ended.value.code == 2
    assert f"argument {words[0]}: " in capsys.readouterr().err


def test_the_archive_holds_what_fits(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (300_000,), dtype=torch.uint8).numpy().tobytes()
    (tmp_path / "large.bin").write_bytes(noise)
    (tmp_path / "long.log").write_bytes(b"begin" + bytes(3 << 20) + b"end")
    step = python("", "long", report="large.bin")
    archive = packed(tmp_path, [Outcome(step, "passed", 1.0)], most=100_000)
    assert archive.stat().st_size <= 100_000
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["long.log", "summary.tsv"]
        log = tar.extractfile("long.log")
        assert log is not None
        text = log.read()
    assert text.startswith(b"begin")
    assert text.endswith(b"end")
    assert len(text) < 2 << 20
    assert (tmp_path / "summary.tsv").read_text() == "long\tpassed\t1 s\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device: the run would begin")
def test_without_a_device_it_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_day.main(["--out", str(tmp_path)]) == 2
    assert "gpu-day: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_table_against_torch_runs_and_its_ways_agree(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_against_torch.main(["--device", "cpu", "--tiny"])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("    lipfast  ") for line in lines) == 11
    assert all(" ms" in line for line in lines[1:] if line.startswith("    "))


def test_products_and_power_iteration_compute_what_the_public_calls_do() -> None:
    torch.manual_seed(0)
    setting = gpu_against_torch.Setting(torch.device("cpu"), tiny=True)
    matrices = setting.random(3, 5, 8)
    exact = torch.linalg.matrix_norm(matrices, ord=2)
    assert torch.allclose(gpu_against_torch.power_iteration(matrices), exact, rtol=1e-3)

    model = gpu_against_torch.perceptron((6, 9, 7, 3))
    x = setting.random(4, 6)
    linear = [module for module in model if isinstance(module, torch.nn.Linear)]
    jacobians = gpu_against_torch.explicit_jacobians(
        x, [module.weight[None] for module in linear], [module.bias[None] for module in linear]
    )
    norms = torch.linalg.matrix_norm(jacobians[0], ord=2)
    assert torch.allclose(norms, lipfast.jacobian_norms(model, x), rtol=1e-5)
    assert torch.allclose(gpu_against_torch.power_norms(jacobians[0]), norms, rtol=1e-2)
