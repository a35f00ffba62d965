from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lipfast
from lipfast.cli.options import parse_bytes
from lipfast.cli.program import app
from lipfast.cli.score import this_command
from lipfast.errors import ArgumentError
from lipfast.scoring import pipeline

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
MODELS = """
from torch import nn

def mlp(width: int):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with models, data and an archive of four checkpoints; the current one."""
    (tmp_path / "lipfast_cli_models.py").write_text(MODELS)
    generator = torch.Generator().manual_seed(0)
    np.save(tmp_path / "x.npy", torch.randn(5, 4, generator=generator).numpy())
    for width in (4, 6):
        for step in (1, 2):
            state = {
                "0.weight": torch.randn(width, 4, generator=generator),
                "0.bias": torch.randn(width, generator=generator),
                "2.weight": torch.randn(3, width, generator=generator),
                "2.bias": torch.randn(3, generator=generator),
            }
            path = tmp_path / "runs" / f"w{width}" / f"step{step}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(state, path, metadata={"width": str(width), "step": str(step)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


SCORE = ["score", "runs", "--arch", "lipfast_cli_models:mlp", "--data", "x.npy", "--out", "scores"]


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_score_show_verify_and_resume(project):
    code, out, err = run(*SCORE)
    assert (code, err) == (0, "")
    assert "4 checkpoints: 4 scored, 0 already in the store, 0 failed" in out
    assert "next: lipfast store show scores" in out
    code, out, _ = run(*SCORE)
    assert code == 0
    assert "0 scored, 4 already in the store" in out
    code, out, _ = run("store", "show", "scores")
    assert code == 0
    assert "4 checkpoints: 4 scored, 0 failed" in out
    assert [line.split()[:3] for line in out.splitlines()[-2:]] == [
        ["w4", "2", "2"],
        ["w6", "2", "2"],
    ]
    code, out, _ = run("store", "verify", "scores")
    assert code == 0
    assert out.endswith(", 4 rows: sound\n")  # a slow machine commits more than one part


def test_json(project):
    code, out, _ = run(*SCORE, "--json", "--limit", "3")
    summary = json.loads(out)
    assert (code, summary["scored"], summary["found"]) == (0, 3, 4)
    overview = json.loads(run("store", "show", "scores", "--json")[1])
    assert (overview["checkpoints"], len(overview["runs"])) == (3, 2)
    assert overview["runs"][0]["lower"] <= overview["runs"][0]["upper"]
    assert json.loads(run("store", "verify", "scores", "--json")[1])["problems"] == []


def test_quiet_and_dry_run(project):
    assert run(*SCORE, "--dry-run")[1].startswith("4 checkpoints: 4 can be scored")
    assert not Path("scores").exists()
    assert run(*SCORE, "--quiet") == (0, "", "")
    assert lipfast.read_scores("scores").num_rows == 4


def test_options_reach_the_library(project):
    options = ["--norm", "inf", "--seed", "3", "--batch-size", "1", "--threads", "1"]
    before = torch.get_num_threads()
    assert run(*SCORE, *options, "--memory", "1M", "--arch-arg", "width=4")[0] == 1
    assert torch.get_num_threads() == before
    table = lipfast.read_scores("scores").to_pydict()
    assert set(table["norm"]) == {float("inf")}
    assert set(table["seed"]) == {3}
    assert sorted(table["status"]) == ["error", "error", "ok", "ok"]


def test_several_archives(project):
    code, out, _ = run("score", "runs/w4", "runs/w6/step1.safetensors", *SCORE[2:])
    assert code == 0
    assert out.startswith("3 checkpoints: 3 scored")


def test_files_that_are_not_looked_at_are_counted(project):
    for name in ("a.h5", "b.h5", "c.onnx"):
        (project / "runs" / name).write_bytes(b"x")
    code, out, _ = run(*SCORE, "--dry-run")
    assert code == 0
    assert "  3 files not looked at, by the endings of their names: .h5 2, .onnx 1\n" in out
    code, out, _ = run(*SCORE, "--json")
    assert json.loads(out)["not_looked_at"] == {".h5": 2, ".onnx": 1}


def test_failed_checkpoints_are_counted_and_change_the_exit_status(project):
    bad = project / "runs" / "bad\x1b[2J\n.safetensors"
    bad.write_bytes(b"nonsense")
    code, out, err = run(*SCORE)
    assert code == 1
    assert "4 scored, 0 already in the store, 1 failed" in out
    assert "1 failed: cannot be read" in out
    assert "bad\\x1b[2J\\x0a.safetensors: truncated" in out
    assert "\x1b" not in out + err
    code, out, err = run("store", "show", "scores")
    assert code == 0
    assert "1 failed: truncated" in out
    assert "\x1b" not in out + err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["score", "missing"], "no such file or folder: 'missing'"),
        (["score", "empty"], "no checkpoints in 'empty'"),
        (["score", "bad\x1b[2J"], "nothing matches 'bad\\x1b[2J'"),
        (["--arch", "nothing:here"], "importing 'nothing' raised ModuleNotFoundError"),
        (["--arch-arg", "wdith=3"], "has no parameter 'wdith'; it has width"),
        (["--arch-arg", "width"], "expected key=value"),
        (["--data", "missing.npy"], "no data at 'missing.npy'"),
        (["--data", "integers.npy"], "dtype int64, expected floating-point"),
        (["--data", "narrow.npy"], "cannot be evaluated on samples of shape (3,)"),
        (["--data", "nan.npy"], "hold NaN or infinity"),
        (["--out", "x.npy"], "is a file"),
        (["--out", "x.npy/below"], "a file is in its place"),
        (["--norm", "3"], "--norm 3: expected 1, 2 or inf"),
        (["--device", "cuda"], "device cuda: no CUDA device"),
        (["--device", "gpu"], "device 'gpu': expected cpu, cuda, cuda:1"),
        (["--device", "mps"], "device 'mps': lipfast has no kernels for it"),
        (["--memory", "lots"], "--memory lots: expected bytes"),
    ],
)
def test_wrong_input_is_one_message_and_exit_status_2(project, change, message):
    Path("empty").mkdir()
    np.save("integers.npy", np.ones((2, 4), dtype=np.int64))
    np.save("narrow.npy", np.ones((2, 3), dtype=np.float32))
    np.save("nan.npy", np.full((2, 4), np.nan))
    command = [*change, *SCORE[2:]] if change[0] == "score" else [*SCORE, *change]
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert err.startswith("lipfast: error: ")
    assert message in err
    assert "\x1b" not in err
    assert err.count("\n") == 1
    assert not list(Path("scores").glob("part-*"))


def test_usage_errors_exit_with_2(project):
    assert run("score", "runs")[0] == 2
    assert run("score")[0] == 2
    assert run("nonsense")[0] == 2
    assert run(*SCORE, "--limit", "0")[0] == 2


def test_ctrl_c_prints_the_command_that_resumes(project, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/bin/lipfast", *SCORE, "--data", "my x.npy"])
    genuine = pipeline.score

    def interrupted(archive, **options):
        def stop(at):
            raise KeyboardInterrupt

        return genuine(archive, **{**options, "progress": stop})

    monkeypatch.setattr(pipeline, "score", interrupted)
    code, out, err = run(*SCORE)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].strip() == shlex.join(["lipfast", *SCORE, "--data", "my x.npy"])
    assert "4 checkpoints: 2 scored" in err
    assert "  2 left: the same command goes on" in err.splitlines()
    assert lipfast.read_scores("scores").num_rows == 2
    monkeypatch.setattr(sys, "argv", ["/x/lipfast/__main__.py", "score"])
    assert this_command().endswith(" -m lipfast score")


def test_bounds(project):
    path = "runs/w4/step2.safetensors"
    code, out, err = run("bounds", path, *SCORE[2:6])
    assert (code, err) == (0, "")
    assert f"file://{project}/{path}" in out
    assert "certified" in out
    found = json.loads(run("bounds", path, *SCORE[2:6], "--json")[1])
    assert found["lower"]["value"] <= found["upper"]["value"]
    assert [layer["shape"] for layer in found["layers"]] == [[4, 4], [3, 4]]
    for layer in found["layers"]:  # what the table shows, and nothing else
        assert f"{layer['upper']:.8g}  {'yes' if layer['certified'] else 'no'}, " in out
        assert layer["log_share"] is None or f"{100 * layer['log_share']:.1f}%" in out
    assert f"{found['ratio']:.8g}" in out and f"{found['upper']['value']:.8g}" in out
    code, explained, _ = run("bounds", path, *SCORE[2:6], "--explain")
    assert code == 0 and explained.startswith(out.rstrip())
    assert "factor" in explained.removeprefix(out.rstrip())
    assert found["metadata"] == {"width": 4, "step": 2}
    run(*SCORE)
    stored = lipfast.read_scores("scores").to_pylist()[1]
    assert stored["upper"] == pytest.approx(found["upper"]["value"], rel=1e-6)
    assert stored["lower"] == pytest.approx(found["lower"]["value"], rel=1e-6)


def test_a_floor_says_that_it_is_no_bound(project):
    path, options = "runs/w4/step2.safetensors", ("--method", "quadratic", "--floor")
    for data in (SCORE[2:6], SCORE[2:4]):
        code, out, err = run("bounds", path, *data, *options)
        assert (code, err) == (0, "")
        assert "no bound that ignores reachability can be below" in out
        assert "not a bound of the Lipschitz constant" in " ".join(out.split())
        found = json.loads(run("bounds", path, *data, *options, "--json")[1])
        assert 0 < found["floor"]["value"] <= found["upper"]["value"]
        assert "floor" not in json.loads(run("bounds", path, *data, "--json")[1])


def test_a_certificate_is_written_and_verified(project):
    path, other = "runs/w4/step2.safetensors", "runs/w6/step2.safetensors"
    quadratic = ("--method", "quadratic", "--certificate", "c.json")
    code, out, _ = run("bounds", path, *SCORE[2:4], *quadratic, "--json")
    assert (code, json.loads(out)["upper"]["method"]) == (0, "quadratic constraints")
    code, again, err = run("verify", "c.json", path, *SCORE[2:4], "--json")
    assert (code, err) == (0, "")
    assert json.loads(again)["upper"]["value"] == json.loads(out)["upper"]["value"]
    code, text, _ = run("verify", "c.json", other, *SCORE[2:4])
    assert (code, "another width" in text) == (1, True)
    code, _, err = run("verify", path, path, *SCORE[2:4])
    assert (code, f"'{path}': " in err) == (2, True)
    code, _, err = run("verify", "runs", path, *SCORE[2:4])
    assert (code, "lipfast store verify" in err) == (2, True)
    code, _, err = run("bounds", path, *SCORE[2:4], "--certificate", "d.json")
    assert (code, "--method quadratic" in err) == (2, True)
    assert not (project / "d.json").exists()


def test_a_network_without_certificate_and_floor_says_so(project):
    text = (
        "import torch\n"
        "def pool():\n"
        "    parts = torch.nn.Unflatten(1, (1, 4)), torch.nn.MaxPool1d(2), torch.nn.Flatten()\n"
        "    ends = torch.nn.Linear(4, 4), torch.nn.Linear(2, 3)\n"
        "    return torch.nn.Sequential(ends[0], *parts, ends[1])\n"
    )
    (project / "lipfast_cli_pool.py").write_text(text)
    torch.manual_seed(0)
    weights = {"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}
    torch.save({**weights, "4.weight": torch.randn(3, 2), "4.bias": torch.randn(3)}, "pool.pt")
    command = "bounds", "pool.pt", "--arch", "lipfast_cli_pool:pool", "--method", "quadratic"
    code, _, err = run(*command, "--certificate", "d.json")
    assert (code, "only chains of linear layers and activations have one" in err) == (2, True)
    assert not (project / "d.json").exists()
    code, out, err = run(*command, "--floor")
    assert (code, err) == (0, "")
    assert re.search(r"^floor +0 +no floor: the rule of aten.max_pool", out, re.MULTILINE)
    assert "can be below" not in out


def test_bounds_without_data(project):
    path = "runs/w4/step2.safetensors"
    code, out, _ = run("bounds", path, *SCORE[2:4])
    assert code == 0
    assert "linear" in out
    found = json.loads(run("bounds", path, *SCORE[2:4], "--input-shape", "4", "--json")[1])
    assert found["upper"]["certified"]
    assert "lower" not in found
    code, _, err = run("bounds", path, *SCORE[2:4], "--input-shape", "4,0")
    assert (code, "--input-shape 4,0: expected sizes" in err) == (2, True)


def test_bounds_of_an_architecture_that_does_not_begin_with_a_linear_layer(project):
    (project / "lipfast_cli_lone.py").write_text("import torch\nrelu = torch.nn.ReLU()\n")
    torch.save({"weight": torch.ones(1)}, "a.pt")
    code, _, err = run("bounds", "a.pt", "--arch", "lipfast_cli_lone:relu")
    assert code == 2
    assert "give --data, or --input-shape such as 3,32,32" in err


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: torch.save(torch.device("cpu"), path), "expected a state dict"),
        (lambda path: torch.save({"width": 4, "state_dict": {"a": torch.ones(1)}}, path), "weight"),
        (lambda path: torch.save({"state_dict": {"a": torch.ones(1)}}, path), "--arch-arg width"),
    ],
    ids=["missing", "truncated", "device", "mismatch", "metadata"],
)
def test_bounds_of_bad_checkpoints(project, write, message):
    write(project / "a.pt")
    code, out, err = run("bounds", "a.pt", *SCORE[2:6])
    assert (code, out) == (2, "")
    assert message in err
    assert "a.pt" in err
    assert "Traceback" not in err


def test_bounds_takes_one_checkpoint(project):
    code, _, err = run("bounds", "runs", *SCORE[2:6])
    assert (code, "holds 4 checkpoints: use 'lipfast score'" in err) == (2, True)


def test_verify_reports_a_corrupt_part(project):
    run(*SCORE)
    (part,) = Path("scores").glob("part-*")
    part.write_bytes(part.read_bytes()[:100])
    code, out, _ = run("store", "verify", "scores")
    assert code == 1
    assert "1 problem\n" in out
    assert part.name in out
    assert run("store", "show", "scores")[0] == 2
    code, _, err = run("store", "verify", "missing")
    assert (code, "no store at 'missing'" in err) == (2, True)


def test_info_and_version():
    code, out, _ = run("info")
    assert code == 0
    assert "capability" in out
    assert json.loads(run("info", "--json")[1])["torch"] == torch.__version__
    assert run("--version") == (0, f"lipfast {lipfast.__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("score",),
        ("bounds",),
        ("verify",),
        ("store",),
        ("store", "show"),
        ("store", "verify"),
        ("store", "compact"),
        ("store", "export"),
    ],
)
def test_every_command_has_help_with_examples(command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert "Usage: " in out
    if command not in ((), ("store",)):
        assert "Example" in out
    if command == ("score",):
        assert "130" in out


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2k", 2048), ("1.5G", 3 << 29), ("4GiB", 4 << 30), ("1MB", 1 << 20)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "nan", "inf", "1X"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ArgumentError, match="--memory"):
        parse_bytes(text)


def test_help_does_not_wait_for_torch():
    code = "import sys, lipfast.cli; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], check=False, env=ENVIRONMENT)
    assert process.returncode == 0


def test_progress_goes_to_a_terminal_on_stderr_only(project):
    controller, terminal = pty.openpty()
    command = [sys.executable, "-m", "lipfast", *SCORE]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, env=ENVIRONMENT, text=True
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(controller, 4096):
                shown += chunk
        except OSError:  # the other end is closed
            pass
        out = process.stdout.read() if process.stdout else ""
    os.close(controller)
    assert process.returncode == 0
    assert b"4/4" in shown
    assert "4 scored" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "scheduler"])
def test_a_real_interruption(project, number):
    script = (
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by background jobs\n"
        "from lipfast import cli\n"
        "from lipfast.scoring.write_behind import WriteBehind\n"
        "append = WriteBehind.append\n"
        "def stop(self, rows):\n"
        "    append(self, rows)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "WriteBehind.append = stop\n"
        "cli.main()\n"
    )
    command = [sys.executable, "-c", script, *SCORE]
    process = subprocess.run(
        command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    assert process.returncode == 128 + signal.SIGINT
    assert "what was done is kept. To go on:" in process.stderr
    assert "Traceback" not in process.stderr
    assert lipfast.read_scores("scores").num_rows == 2


def test_far_too_many_threads_are_refused(project):
    code, _, err = run(*SCORE, "--threads", "1000000")
    assert code == 2
    assert "--threads 1000000: expected at most" in err


def test_a_full_disk_behind_stdout_is_one_line(project, monkeypatch):
    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lipfast.cli.terminal.print_json", full)
    code, _, err = run("info", "--json")
    assert (code, err) == (2, "lipfast: error: [Errno 28] No space left on device\n")


def test_what_limit_leaves_is_said(project):
    assert run(*SCORE, "--limit", "3")[1].splitlines()[1] == ("  1 left: the same command goes on")
    assert "left" not in run(*SCORE)[1]


def test_the_resuming_command_is_as_it_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["elsewhere/lipfast", "score", "a b"])
    assert this_command() == "elsewhere/lipfast score 'a b'"


def test_a_part_of_an_archive(project):
    code, out, _ = run(*SCORE, "--where", "step >= 2", "--where", "width = 4")
    assert (code, lipfast.read_scores("scores").num_rows) == (0, 1)
    assert "  3 left out by --where or --every" in out.splitlines()
    code, out, _ = run(*SCORE, "--every", "2", "--json")
    summary = json.loads(out)
    assert (code, summary["scored"], summary["left_out"]) == (0, 2, 2)
    assert lipfast.read_scores("scores")["step"].to_pylist() == [1, 2, 1]
    for change in (["--every", "0"], ["--where", "step"], ["--where", "step >="]):
        assert run(*SCORE, *change)[0] == 2


def test_metadata_from_paths(project):
    options = ["--pattern", "{kind}{width:d}/step{number:d}.safetensors"]
    assert run(*SCORE, *options, "--where", "number = 2")[0] == 0
    table = lipfast.read_scores("scores").to_pydict()
    assert (table["meta.kind"], table["meta.number"]) == (["w", "w"], [2, 2])
    code, _, err = run(*SCORE, "--pattern", "{run}/epoch{epoch:d}.pt")
    assert (code, "describes none of 4 paths" in err) == (2, True)


def test_two_networks_in_one_file(project):
    (path,) = Path("runs/w4").glob("step1*")
    weights = load_file(path)
    both = {f"{name}.{key}": value.clone() for name in ("a", "b") for key, value in weights.items()}
    save_file(both, "both.safetensors", {"width": "4"})
    code, out, _ = run("score", "both.safetensors", *SCORE[2:])
    note = "weights below 'a' taken; 'b' fits, too: --prefix chooses"
    assert (code, f"1 scored with a note: {note}" in out) == (0, True)
    code, out, _ = run("score", "both.safetensors", *SCORE[2:], "--prefix", "b")
    assert (code, "weights below 'b' taken" in out) == (0, True)
    code, out, _ = run("bounds", "both.safetensors", *SCORE[2:4])
    assert (code, note in out) == (0, True)


def test_failed_checkpoints_are_left_alone_until_asked_for(project):
    bad = project / "runs" / "bad.pt"
    bad.write_bytes(b"nonsense")
    assert run(*SCORE)[0] == 1
    code, out, _ = run(*SCORE)
    assert code == 1
    assert "  1 failed before: --retry-failed tries them again" in out.splitlines()
    code, out, _ = run(*SCORE, "--retry-failed")
    assert (code, "4 already in the store, 1 failed" in out) == (1, True)
    bad.unlink()
    code, out, _ = run(*SCORE)
    assert (code, "failed before" in out) == (0, False)


def test_watching_until_interrupted(project, monkeypatch):
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("lipfast.scoring.watch.looks.__defaults__", (sleep,))
    monkeypatch.setattr(sys, "argv", ["lipfast", *SCORE, "--watch"])
    code, out, err = run(*SCORE, "--watch", "--interval", "0.5")
    assert (code, out, looks) == (130, "", [0.5] * 3)
    assert "4 checkpoints: 4 scored" in err  # found unchanged by the second look
    assert err.splitlines()[-1].endswith("--watch")
    assert run(*SCORE, "--interval", "0")[0] == 2


def test_export_and_compact(project):
    run(*SCORE, "--limit", "2")
    run(*SCORE)
    code, out, _ = run("store", "export", "scores", "all.csv")
    assert (code, "all.csv" in out) == (0, True)
    assert len(Path("all.csv").read_text().splitlines()) == 5
    assert run("store", "export", "scores", "layers.jsonl", "--table", "layers")[0] == 0
    layers = [json.loads(line) for line in Path("layers.jsonl").read_text().splitlines()]
    assert [layer["index"] for layer in layers] == [0, 1] * 4
    code, out, _ = run("store", "compact", "scores")
    assert code == 0
    assert len(list(Path("scores").glob("part-*"))) == 1
    assert lipfast.read_scores("scores").num_rows == 4
    code, _, err = run("store", "export", "scores", "all.xlsx")
    assert (code, "all.xlsx" in err) == (2, True)


def test_the_engine_is_local_or_ray(project, monkeypatch):
    code, _, err = run(*SCORE, "--engine", "spark")
    assert (code, "engine 'spark': expected local or ray" in err) == (2, True)
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(*SCORE, "--engine", "ray", "--workers", "2")
    assert (code, "pip install 'lipfast[ray]'" in err) == (2, True)
    assert not list(Path("scores").glob("part-*"))
    assert run(*SCORE, "--workers", "0")[0] == 2


def test_failures_are_listed_each_with_its_reason(project):
    assert run("score", *SCORE[1:])[0] == 0
    assert run("store", "show", "scores", "--failed")[1] == "nothing failed\n"
    (project / "runs" / "empty.pt").write_bytes(b"")
    (project / "runs" / "bad.pt").write_bytes(b"nonsense")
    code, out, _ = run(*SCORE)
    assert code == 1
    assert out.splitlines()[-1] == "next: lipfast store show scores --failed"
    lines = run("store", "show", "scores", "--failed")[1].splitlines()
    assert lines[0] == "2 failed: cannot be read"
    assert "runs/bad.pt: truncated, or not weights" in lines[1]
    assert "runs/empty.pt: truncated, or not yet written: it is empty" in lines[2]
    listed = json.loads(run("store", "show", "scores", "--failed", "--json")[1])
    assert [failure["kind"] for failure in listed] == ["cannot be read"] * 2


def test_an_unknown_function_is_answered_with_those_that_are_there(project):
    code, _, err = run(*[w.replace(":mlp", ":nope") for w in SCORE])
    assert code == 2
    assert "has no 'nope'; its own functions and classes are mlp" in err
