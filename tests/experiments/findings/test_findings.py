"""Each study's evaluation on made-up results whose answer is known, and its figure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from experiments.findings import FINDINGS, Finding
from experiments.results import Results, Rows

WIDTHS = (4, 8, 16, 32, 64)
Row = dict[str, Any]


def _results(rows: list[Row], settings: Mapping[str, Mapping[str, Any]] | None = None) -> Results:
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    return Results(Rows.of(table), "laptop", settings or {"x": {}})


def _bump(width: float, peak: float) -> float:
    return 4 / (1 + abs(np.log2(width / peak)))


def _run(**values: Any) -> Row:
    basic: Row = {"study": "s", "variant": "", "width": 16, "seed": 0, "step": 100, "epoch": 100.0}
    losses = {"train_loss": 0.1, "test_loss": 1.0, "train_error": 0.0, "test_error": 0.3}
    bounds = {"lower": 2.0, "certified": 2.0, "mean": 1.5, "upper": 9.0, "log_upper": np.log(9.0)}
    return {**basic, **losses, **bounds, "path_length": 3.0, **values}


def _sweep(test: float = 16, lower: float = 16, upper: float = 16, **more: Any) -> list[Row]:
    return [
        _run(
            width=width,
            seed=seed,
            test_loss=_bump(width, test),
            lower=_bump(width, lower),
            mean=0.5 * _bump(width, lower),
            upper=3 * _bump(width, upper),
            path_length=_bump(width, 16),
            **more,
        )
        for width, seed in itertools.product(WIDTHS, (0, 1))
    ]


def _training(variant: str, slope: float, **more: Any) -> list[Row]:
    """Bounds that grow from 1 at the start as powers of the epoch."""
    return [
        _run(
            variant=variant,
            seed=seed,
            step=epoch,
            epoch=float(epoch),
            lower=max(1, epoch) ** slope,
            certified=max(1, epoch) ** slope,
            mean=0.5 * max(1, epoch) ** slope,
            upper=8.0 * max(1, epoch) ** (1.2 * slope),
            path_length=float(epoch) ** slope if epoch else 0.0,
            checkpoint_path=float(epoch) ** slope if epoch else 0.0,
            **more,
        )
        for epoch, seed in itertools.product((0, 1, 3, 10, 30, 100, 300, 1000), (0, 1))
    ]


def _searched(name: str, factor: float) -> list[Row]:
    return [{**row, name: factor * row["lower"]} for row in _training("narrow", 0.5)]


def _toy(grid: float) -> list[Row]:
    bounds = [{**row, "kind": "bounds", "grid": grid * row["lower"]} for row in _training("", 0.5)]
    cells = [{"kind": "map", "place": i, "norm": 1.0 + i, "label": i % 3} for i in range(10_000)]
    return [*bounds, *cells, {"kind": "sample", "x": 0.5, "y": 1.0, "label": 1}]


def _initial(slope: float) -> list[Row]:
    start = [
        _run(kind="start", width=w, lower=w**slope, mean=0.5 * w**slope, upper=3 * w**0.4)
        for w in WIDTHS
    ]
    return start + _sweep(kind="trained")


def _deep(log_upper: float) -> list[Row]:
    vit = _run(variant="vit", upper=np.inf, log_upper=np.inf)
    return [_run(variant="resnet", log_upper=log_upper), vit]


def _parts(bias: float, peak: float) -> list[Row]:
    rows = []
    for width in WIDTHS:
        variance = 10 * _bump(width, peak)
        constant = 20 + bias * _bump(width, 16)
        rows.append(
            {
                "width": width,
                "variance": variance,
                "bias": constant,
                "test_loss": constant + variance,
                "estimate": 50 * variance,
                "centred": 49 * variance,
                "certified": 500 * variance,
            }
        )
    return rows


def _noise(peak: Callable[[float], float], fall: float) -> list[Row]:
    return [
        {**row, "noise": noise, "lower": row["lower"] * (1 - fall * abs(noise - 0.4))}
        for noise in (0.0, 0.2, 0.4, 0.6, 0.8)
        for row in _sweep(lower=peak(noise))
    ]


def _losses(mse: float, softmax: float) -> list[Row]:
    ce = _training("ce", 0.5)
    return [
        *ce,
        *(
            {**r, "variant": "mse", "lower": mse * r["lower"], "upper": mse * r["upper"]}
            for r in ce
        ),
        *({**r, "variant": "softmax of ce", "lower": softmax * r["lower"]} for r in ce),
    ]


def _depth(kind: str, slope: float) -> list[Row]:
    return [
        _run(
            kind=kind,
            depth=float(depth),
            seed=seed,
            lower=depth**slope,
            mean=0.5 * depth ** (0.6 * slope),
            upper=9 * depth ** (1.5 * abs(slope)),
        )
        for depth, seed in itertools.product(range(1, 6), (0, 1))
    ]


def _samples(slope: float) -> list[Row]:
    return [
        _run(samples=float(n), lower=n**slope, mean=0.5 * n**slope, upper=5 * n ** (1.2 * slope))
        for n in (100, 400, 800, 1600)
    ]


_NONE = dict.fromkeys(("dropout", "weight_decay", "spectral_constraint", "lipschitz_penalty"), 0.0)


def _regularised(key: str, strengths: tuple[float, ...], effect: float) -> list[Row]:
    return [
        _run(**{**_NONE, key: strength}, lower=2 * effect**place, test_loss=3.0 * effect**place)
        for place, strength in enumerate(strengths, 1)
    ]


def _decay(effect: float) -> list[Row]:
    rows = _regularised("dropout", (0.1, 0.2, 0.4), effect)
    rows += _regularised("weight_decay", (1e-4, 1e-3), effect)
    return [_run(**_NONE, lower=2.0, test_loss=3.0), *rows]


def _constrained(effect: float, excess: float) -> list[Row]:
    limited = _regularised("spectral_constraint", (1.0, 4.0), effect)
    for row in limited:
        row["upper"] = excess * row["spectral_constraint"] ** 2
    rows = [*limited, *_regularised("lipschitz_penalty", (0.01, 0.1), effect)]
    return [{**row, "layers": 2} for row in (_run(**_NONE, lower=2.0, test_loss=3.0), *rows)]


def _histogram(tail: float) -> list[Row]:
    return [
        {
            "width": width,
            "low": 2.0**place,
            "high": 2.0 ** (place + 1),
            "share": 0.25,
            "median": _bump(width, 16),
            "largest": tail * _bump(width, 16),
            "tail": tail,
        }
        for width in WIDTHS
        for place in range(4)
    ]


def _perturbed(attack: float, noise: float, quotient: float) -> list[Row]:
    kinds = {("clean", 0.0): 1.0, ("attack", 0.5): attack}
    kinds.update({("noise", scale): noise for scale in (0.1, 0.3, 1.0, 3.0)})
    return [
        {
            "network": network,
            "width": width,
            "kind": kind,
            "level": level,
            "clean": 2.0,
            "lower": 2.0 * factor,
            "quotient": 2.0 * factor * quotient,
            "test_loss": 1.0,
        }
        for network in ("C1-width-fcn-ce", "C3-width-cnn")
        for width in WIDTHS
        for (kind, level), factor in kinds.items()
    ]


def _optimisers(ratio: float) -> list[Row]:
    sgd = _training("sgd", 0.5)
    names = ("lower", "upper", "checkpoint_path")
    adam = [{**r, "variant": "adam", **{n: ratio * r[n] for n in names}} for r in sgd]
    return [*sgd, *adam]


def _swept(key: str, slope: float) -> list[Row]:
    return [
        _run(**{key: value}, lower=value**slope, mean=value**slope, upper=2 * value**slope)
        for value in (0.01, 0.1, 1.0)
    ]


def _evolution(narrow: float, wide: float) -> list[Row]:
    return _training("narrow", narrow, width=256) + _training("wide", wide, width=2048)


def _laws(ce: float, mse: float) -> list[Row]:
    return [
        {**row, "setting": setting}
        for setting, slope in (("FCN, cross-entropy", ce), ("FCN, squared error", mse))
        for row in _training(setting, slope)
    ]


# Results that meet all criteria of a study, and results that meet none or some.
CASES: dict[str, tuple[list[Row], list[Row], str]] = {
    "A1": (_evolution(0.6, 0.4), _evolution(0.1, 0.12), "did not hold"),
    "A2": (_searched("convex", 1.2), _searched("convex", 0.9), "partly"),
    "A3": (_laws(0.4, 0.6), _laws(1.1, 1.05), "did not hold"),
    "A4": (_searched("pairs", 0.7), _searched("pairs", 1.2), "did not hold"),
    "A5": (_toy(1.05), _toy(0.9), "partly"),
    "A6": (_deep(27 * np.log(10)), _deep(np.log(10)), "partly"),
    "C1": (_sweep(), _sweep(lower=64, upper=4), "partly"),
    "C2": (_sweep(lower=8), _sweep(test=64, lower=4, upper=4), "did not hold"),
    "C3": (_sweep(upper=32), _sweep(test=4, lower=64, upper=64), "did not hold"),
    "C4": (_sweep(), _sweep(lower=64), "partly"),
    "C5": (_initial(-0.1), _initial(0.3), "partly"),
    "D": (_parts(0.1, 16), _parts(12, 64), "partly"),
    "E": (
        _noise(lambda noise: 8 if noise < 0.4 else 16, 1.0),
        _noise(lambda noise: 64, 0.0),
        "partly",
    ),
    "F1": (_losses(0.8, 0.1), _losses(1.3, 0.9), "did not hold"),
    "F2": (_optimisers(5.0), _optimisers(1.1), "partly"),
    "F3": (
        _depth("trained", 2.0) + _depth("start", -2.0),
        _depth("trained", -1.0) + _depth("start", 1.0),
        "did not hold",
    ),
    "F4": (_samples(0.4), _samples(-0.4), "partly"),
    "F5": (_decay(0.7), _decay(1.2), "did not hold"),
    "F6": (_constrained(0.7, 1.0), _constrained(1.2, 3.0), "partly"),
    "F7": (_histogram(1.5), _histogram(20), "partly"),
    "G": (_perturbed(1.1, 1.5, 0.8), _perturbed(2.0, 5.0, 1.2), "did not hold"),
    "X1": (_swept("lr", -0.5), _swept("lr", 0.0), "did not hold"),
    "X2": (_swept("batch_size", 0.5), _swept("batch_size", 0.01), "did not hold"),
    "X3": (_optimisers(5.0), _optimisers(0.9), "partly"),
    "X4": (_searched("ascent", 1.1), _searched("ascent", 9.0), "partly"),
}


def test_every_study_has_its_cases() -> None:
    assert [finding.id for finding in FINDINGS] == list(CASES)
    assert len({finding.name for finding in FINDINGS}) == len(FINDINGS)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.id)
def test_verdicts_follow_the_numbers(finding: Finding) -> None:
    good, bad, verdict = CASES[finding.id]
    held = finding.evaluate(_results(good))
    assert [check.claim for check in held.checks if not check.held] == []
    assert held.verdict == "held"
    assert held.headline
    failed = finding.evaluate(_results(bad))
    assert failed.verdict == verdict
    assert len(failed.checks) == len(held.checks)


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.id)
def test_figures_have_labels(finding: Finding) -> None:
    figure = finding.draw(_results(CASES[finding.id][0]))
    figure.draw_without_rendering()
    shown = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert all(axes.has_data() for axes in shown)
    assert any(axes.get_ylabel() for axes in shown)
    assert all(axes.get_xlabel() or axes.get_xticklabels() for axes in shown)


def test_variants_of_a_width_study_are_told_apart() -> None:
    rows = [{**row, "variant": "good"} for row in _sweep()]
    rows += [{**row, "variant": "bad"} for row in _sweep(lower=64)]
    finding = next(finding for finding in FINDINGS if finding.id == "C3")
    outcome = finding.evaluate(_results(rows))
    assert {check.claim.split(":")[0] for check in outcome.checks if not check.held} == {"bad"}
    assert len(finding.draw(_results(rows)).axes) == 4


def test_networks_that_learnt_nothing_count_and_are_named() -> None:
    rows = [{**row, "chance_error": 0.9} for row in _sweep()]
    for row in rows:
        if (row["width"], row["seed"]) in {(4, 0), (8, 1)}:
            row.update(train_error=0.9, test_loss=9.0, lower=1e-3, upper=1.0)
    finding = next(finding for finding in FINDINGS if finding.id == "C3")
    outcome = finding.evaluate(_results(rows))
    (note,) = [note for note in outcome.notes if "learnt nothing" in note]
    assert note.startswith("2 of 10 networks (widths: 4, 8) learnt nothing")
    assert "test loss: peak at width 16" in note
    assert "peak at width 8" in outcome.checks[0].ours
    lines = [axes.lines for axes in finding.draw(_results(rows)).axes]
    assert [sum(line.get_linestyle() == ":" for line in drawn) for drawn in lines] == [1, 2]
    clean = finding.evaluate(_results(_sweep()))
    assert not any("learnt nothing" in note for note in clean.notes)


def test_a_test_loss_largest_at_the_end_has_its_inner_peak_named() -> None:
    rows = [
        {**row, "test_loss": 9.0 if row["width"] == 4 else row["test_loss"]} for row in _sweep()
    ]
    finding = next(finding for finding in FINDINGS if finding.id == "C4")
    outcome = finding.evaluate(_results(rows))
    assert not outcome.checks[0].held
    assert any("local maximum at width 16" in note for note in outcome.notes)


def test_a_width_study_without_upper_bound() -> None:
    rows = [{**row, "upper": np.inf} for row in _sweep()]
    finding = next(finding for finding in FINDINGS if finding.id == "C4")
    outcome = finding.evaluate(_results(rows))
    assert outcome.verdict == "held"
    assert any("attention" in note for note in outcome.notes)
    assert not any("upper" in check.claim for check in outcome.checks)
