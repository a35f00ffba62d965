from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from experiments import __main__ as command_line
from experiments.study import load_config
from experiments.sweep import SweepFolder, TrainingSummary, found_folder
from lipfast.errors import LipfastError


def _call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["experiments", *arguments])
    with pytest.raises(SystemExit) as stopped:
        command_line.main()
    code = stopped.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch, scores: pa.Table) -> None:
    summary = TrainingSummary(
        trained=5, skipped=1, diverged=("width-00004-seed-1",), checkpoints=24, seconds=1.0
    )
    monkeypatch.setattr(command_line, "train_sweeps", lambda sweeps, engine: summary)
    monkeypatch.setattr(command_line, "_read_scores", lambda folder: scores)
    monkeypatch.setattr(command_line, "_brackets", lambda folder, table: [])
    monkeypatch.setattr(command_line, "_score", lambda config, folder, engine: 0)


RUN = ("run", "double-descent", "--scale", "tiny", "--out")


@pytest.mark.usefixtures("no_work")
def test_run_reports_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, *RUN, str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "5 runs trained, 1 complete already, 24 checkpoints" in output
    assert "diverged (NaN or infinite, left out): width-00004-seed-1" in output
    assert "peak of the test loss: width 16" in output
    assert "peak of the upper bound: width 8 (a neighbouring width)" in output
    assert "peaks aligned: yes" in output
    assert (tmp_path / "double-descent-tiny" / "double-descent.png").is_file()


@pytest.mark.usefixtures("no_work")
def test_peaks_that_do_not_align_are_said_but_no_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scores: pa.Table,
) -> None:
    index = scores.column_names.index("upper")
    shifted = scores.set_column(index, "upper", scores["meta.width"])
    monkeypatch.setattr(command_line, "_read_scores", lambda folder: shifted)
    assert _call(monkeypatch, *RUN, str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "peak of the upper bound: width 64 (NOT at the same or a neighbouring" in output
    assert "peaks aligned: no" in output


@pytest.mark.usefixtures("no_work")
def test_failures_and_interruption_show_in_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "_score", lambda config, folder, engine: 1)
    assert _call(monkeypatch, *RUN, str(tmp_path)) == 1
    assert "some checkpoints could not be scored" in capsys.readouterr().err

    def interrupted(sweeps: object, engine: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "train_sweeps", interrupted)
    assert _call(monkeypatch, *RUN, str(tmp_path), "--force") == 130
    error = capsys.readouterr().err
    resume = command_line.shown_command("-m", "experiments", "run", "double-descent", "--scale")
    assert f"To go on:\n  {resume} tiny" in error
    assert "--force" not in error
    assert _call(monkeypatch, *RUN, str(tmp_path), "--upper", "product") == 130
    assert " --upper product\n" in capsys.readouterr().err


def test_list_and_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _call(monkeypatch, "list") == 0
    assert "double-descent (demo, tiny): " in capsys.readouterr().out
    assert _call(monkeypatch, "run", "double-ascent") == 2
    assert "did you mean 'double-descent'" in capsys.readouterr().err
    assert _call(monkeypatch, "run", "double-descent", "--upper", "sdp") == 2
    assert "--upper is 'sdp'; expected product or quadratic" in capsys.readouterr().err
    assert _call(monkeypatch, "figure", "double-descent", "--out", str(tmp_path)) == 1
    assert "python -m experiments run double-descent" in capsys.readouterr().err


def test_a_scorer_that_fails_outright_is_an_error(tmp_path: Path) -> None:
    config = load_config("double-descent", "tiny")
    with pytest.raises(LipfastError, match="data"):
        command_line._score(config, SweepFolder(tmp_path))


def test_the_whole_way_with_the_real_scorer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lipfast  # noqa: PLC0415

    assert _call(monkeypatch, *RUN, str(tmp_path)) == 0
    output = capsys.readouterr().out
    assert "peak of the test loss: width" in output
    assert "--upper quadratic\n" in output
    assert "upper / lower at the 6 last checkpoints: geometric mean 1." in output
    assert "over the truth, enumerated for 6 networks: geometric mean 1." in output
    assert (tmp_path / "double-descent-tiny" / "double-descent-brackets.png").is_file()
    folder = found_folder(tmp_path / "double-descent-tiny")
    config = load_config("double-descent", "tiny")
    scored = lipfast.read_scores(folder.scores)
    expected = len(config.widths) * len(config.seeds) * len(config.checkpoints)
    assert scored.num_rows == expected
    assert set(scored["status"].to_pylist()) == {"ok"}
    for lower, upper in zip(
        scored["jacobian_max"].to_pylist(), scored["upper"].to_pylist(), strict=True
    ):
        assert 0 < lower <= upper * (1 + 1e-5)
    assert "quadratic constraints" in scored["upper_method"].to_pylist()

    assert _call(monkeypatch, *RUN, str(tmp_path), "--upper", "product") == 0
    output = capsys.readouterr().out
    assert "0 runs trained, 6 complete already" in output
    assert "last checkpoints" not in output
    products = lipfast.read_scores(found_folder(folder.root).scores)
    assert set(products["upper_method"].to_pylist()) == {"product of certified spectral norms"}
    assert folder.scores.is_dir()
    assert _call(monkeypatch, "figure", *RUN[1:], str(tmp_path)) == 0
    assert "brackets" not in capsys.readouterr().out


def test_commands_are_shown_relative_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(scripts / "python"))
    command = command_line.score_command(
        load_config("double-descent", "tiny"), SweepFolder(tmp_path / "runs" / "a b")
    )
    assert command_line.shown_command(*command[1:]).startswith(
        ".venv/bin/python -m lipfast score 'runs/a b/checkpoints' --arch"
    )
    assert command[-2:] == ["--upper", "quadratic"]
    (scripts / "lipfast").touch()
    assert command_line.shown_command(*command[1:]).startswith(".venv/bin/lipfast score 'runs/a b")


@pytest.mark.usefixtures("no_work")
def test_a_sweep_that_diverged_as_a_whole_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = TrainingSummary(
        trained=1, skipped=0, diverged=("width-00004-seed-1",), checkpoints=1, seconds=1.0
    )
    monkeypatch.setattr(command_line, "train_sweeps", lambda sweeps, engine: summary)
    assert _call(monkeypatch, *RUN, str(tmp_path)) == 1
    assert "every run diverged" in capsys.readouterr().err


def test_an_unwritable_folder_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert _call(monkeypatch, *RUN, str(tmp_path / "file")) == 2
    assert "Choose another folder with --out" in capsys.readouterr().err
