"""Progress of the public calls: when it is shown, where, and that nothing else changes."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest
import torch
from torch.utils.data import DataLoader

import lipfast
from lipfast.estimators import progress as progress_module
from lipfast.estimators.progress import shown_progress
from lipfast.ops import interrupts
from tests.support.jacobian_cases import perceptron, samples

X = samples(50, 4)
MODEL = perceptron(4, 6, 3)
PLAN = lipfast.compile(MODEL, X[:2])
STATE = MODEL.state_dict()
LOADER = DataLoader(X, batch_size=10)
# Call -> what is shown.
CALLS: dict[str, tuple[Callable[[bool | None], object], str]] = {
    "bounds": (lambda show: lipfast.bounds(MODEL, LOADER, progress=show), "Jacobian norms"),
    "lower_bound": (
        lambda show: lipfast.lower_bound(MODEL, X, search="pairs", progress=show),
        "search",
    ),
    "upper_bound": (lambda show: lipfast.upper_bound(MODEL, X, progress=show), "layer norms"),
    "jacobian_norms": (
        lambda show: lipfast.jacobian_norms(MODEL, LOADER, progress=show),
        "Jacobian norms",
    ),
    "of a tensor": (
        lambda show: lipfast.jacobian_norms(MODEL, X, progress=show),
        "Jacobian norms",
    ),
    "Plan.upper": (lambda show: PLAN.upper(STATE, progress=show), "layer norms"),
    "Plan.lower": (lambda show: PLAN.lower(STATE, X, progress=show), "certified secants"),
    "Plan.bounds": (lambda show: PLAN.bounds(STATE, X, progress=show), "layer norms"),
    "Plan.tracker": (lambda show: PLAN.tracker(progress=show).upper(STATE), "layer norms"),
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", CALLS)
def test_progress_is_shown_where_it_is_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, label = CALLS[name]
    shown = {}
    for patience in (0.0, 1e9):
        monkeypatch.setattr(progress_module, "PATIENCE", patience)
        for target in (Terminal, io.StringIO):
            for show in (None, True, False):
                stream = target()
                monkeypatch.setattr("sys.stderr", stream)
                call(show)
                shown[patience, target, show] = label in stream.getvalue()
    for (patience, target, show), found in shown.items():
        waited = show is None and target is Terminal and patience == 0.0
        assert found == (show is True or waited)
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_results_are_the_same_with_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = lipfast.bounds(MODEL, LOADER)
    generator = torch.get_rng_state()
    monkeypatch.setattr("sys.stderr", Terminal())
    assert lipfast.bounds(MODEL, LOADER, progress=True) == expected
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_long_item_is_shown_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, shown = Terminal(), threading.Event()
    show = progress_module._Bar.show

    def shown_then(bar: progress_module._Bar) -> None:
        show(bar)
        shown.set()

    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(progress_module._Bar, "show", shown_then)
    monkeypatch.setattr(progress_module, "PATIENCE", 0.01)
    with shown_progress("work", 3, None) as advance:
        assert shown.wait(60)
        advance(3)
    assert "work" in terminal.getvalue()


def test_an_error_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(lipfast.LipfastError):
        lipfast.lower_bound(torch.nn.Linear(9, 2), X, progress=True)
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_progress_of_a_file_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.StringIO()
    monkeypatch.setattr("sys.stderr", target)
    with shown_progress("work", 3, True) as advance:
        advance(1)
        advance(2)
    assert len(target.getvalue().strip().splitlines()) == 1
    assert "100%" in target.getvalue()


def test_a_step_of_unknown_length_shows_how_far_its_op_is(monkeypatch: pytest.MonkeyPatch) -> None:
    target = io.StringIO()
    monkeypatch.setattr("sys.stderr", target)
    with shown_progress("work", None, True):
        interrupts._WATCHER.get()(0.37)
    assert "37%" in target.getvalue()
    target.truncate(0)
    with shown_progress("work", 3, True) as advance:  # items that are counted say more
        assert interrupts._WATCHER.get() is None
        advance(3)
    assert "100%" in target.getvalue()
