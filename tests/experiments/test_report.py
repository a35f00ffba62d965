from __future__ import annotations

from pathlib import Path

import pytest

from experiments import __main__ as command_line
from experiments.findings import FINDINGS
from experiments.report import (
    build_report,
    describe_settings,
    draw_stored,
    read_sections,
    report_text,
    verdict_lines,
)
from experiments.results import RESULTS_FOLDER, write_results
from lipfast.errors import StoreError


def _store(folder: Path) -> None:
    rows = [
        {
            "study": "F4-samples",
            "variant": f"samples-{n}",
            "width": 16,
            "seed": 0,
            "step": 9,
            "samples": float(n),
            "lower": n**0.4,
            "mean": 0.5 * n**0.4,
            "upper": 9 * n**-0.1,
        }
        for n in (100, 200, 400)
    ]
    settings = {f"F4-samples/samples-{n}": {"lr": 0.5, "train_size": n} for n in (100, 200, 400)}
    write_results("F4-samples", rows, scale="laptop", settings=settings, folder=folder)


def test_the_report_is_built_from_stored_results(tmp_path: Path) -> None:
    _store(tmp_path / "results")
    report, figures = tmp_path / "docs" / "study.md", tmp_path / "docs" / "pictures"
    sections = build_report(tmp_path / "results", report, figures)
    text = report.read_text(encoding="utf-8")
    assert [section.verdict for section in sections].count("not run") == len(FINDINGS) - 1
    assert f"{len(FINDINGS)} questions: 1 partly, {len(FINDINGS) - 1} not run." in text
    assert [path.name for path in figures.iterdir()] == ["study-F4-samples.png"]
    assert "(pictures/study-F4-samples.png)" in text
    assert "| [F4](#f4-the-number-of-training-samples) |" in text
    assert "| partly, 1 of 2 |" in text
    assert "## F4: The number of training samples" in text
    assert text.count("*At the scale `paper`*") == 4  # X1 to X4
    assert "-0.10, 0.40, 0.40 | **no** |" in text
    assert "`lr` 0.5; `train_size` 100 (samples-100), 200 (samples-200), 400" in text
    assert "Verdict: **partly** (1 of 2 criteria met)." in text
    assert build_report(tmp_path / "results", report, figures) is not sections
    assert report.read_text(encoding="utf-8") == text


def test_nothing_run_is_said_plainly(tmp_path: Path) -> None:
    text = report_text(read_sections(tmp_path))
    assert f"{len(FINDINGS)} questions: {len(FINDINGS)} not run." in text
    assert "![" not in text


def test_settings_leave_out_defaults_and_say_differences() -> None:
    first = {"name": "s", "lr": 0.1, "bias": True, "widths": [1, 2], "momentum": 0.0}
    assert describe_settings({"s": first}) == "`lr` 0.1; `widths` 1 2"
    second = {**first, "bias": False}
    assert describe_settings({"s/x": first, "s/y": second}) == (
        "`lr` 0.1; `bias` true (x), false (y); `widths` 1 2"
    )


def test_figures_and_verdicts_of_one_study(tmp_path: Path) -> None:
    _store(tmp_path)
    assert draw_stored("F4-samples", tmp_path, tmp_path).read_bytes().startswith(b"\x89PNG")
    lines = verdict_lines("F4-samples", tmp_path)
    assert lines[0].startswith("NOT met all bounds grow")
    assert lines[-1].startswith("F4: partly; slope")
    with pytest.raises(StoreError, match="experiments collect A1-evolution"):
        verdict_lines("A1-evolution", tmp_path)


def test_the_command_line_draws_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from experiments import report as reports  # noqa: PLC0415

    _store(tmp_path / "results")
    monkeypatch.setattr(reports, "REPORT", tmp_path / "study.md")
    monkeypatch.setattr(reports.build_report, "__defaults__", (None, tmp_path / "s.md", tmp_path))
    for arguments in (("report",), ("figure", "A1-evolution")):
        monkeypatch.setattr(
            "sys.argv", ["experiments", *arguments, "--results", str(tmp_path / "results")]
        )
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        assert stopped.value.code == (0 if arguments == ("report",) else 1)
    shown = capsys.readouterr()
    assert "F4: partly" in shown.out
    assert "A1-evolution.parquet does not exist" in shown.err


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    sections = read_sections(RESULTS_FOLDER)
    text = (Path(command_line.__file__).parent.parent / "docs" / "study.md").read_text("utf-8")
    assert report_text(sections) == text
