"""Which checkpoints are taken, and in which order."""

from __future__ import annotations

import itertools

import pytest

from lipfast.checkpoints import CheckpointFile, Metadata
from lipfast.errors import ArgumentError
from lipfast.scoring.order import by_run, every, interleaved, pieces
from lipfast.scoring.selection import Selection
from lipfast.scoring.where import Where


def files(runs: int, steps: int, **extra: object) -> list[CheckpointFile]:
    return [
        CheckpointFile(f"file:///r{r}/{s}.pt", f"/r{r}/{s}.pt", 1, 1.0, f"r{r}", extra=extra)
        for r, s in itertools.product(range(runs), range(steps))
    ]


def names(found: list[CheckpointFile]) -> list[str]:
    return [file.path.removesuffix(".pt") for file in found]


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("step >= 100", True),
        ("step>100", False),
        ("step=100.0", True),
        ("epoch < 2", True),
        ("run = w64", True),
        ("run != w64", False),
        ("optimizer == 'adam'", True),
        ("optimizer < b", False),  # only numbers have an order
        ("flag = true", True),
        ("flag = 1", False),
        ("missing = 1", False),
        ("missing != 1", False),
        ("name = a=b", True),
    ],
)
def test_conditions(condition, holds):
    raw = {"step": "100", "epoch": 1.5, "optimizer": "adam", "flag": "true", "name": "a=b"}
    assert Where.parse(condition).holds(Metadata(raw, folder="w64")) is holds


@pytest.mark.parametrize("text", ["step", "step >", "> 3", "", "= ="])
def test_what_is_no_condition(text):
    with pytest.raises(ArgumentError, match="expected KEY OP VALUE"):
        Where.parse([text])


def test_what_can_be_said_without_reading():
    where = Where.parse(["step > 3", "width = 4"])
    assert where.known({"step": 5}) is None
    assert where.known({"step": 2}) is False
    assert where.known({"step": 5, "width": 4}) is True
    assert where.known({}) is None
    assert Where().known({}) is True


def test_runs_are_in_the_order_of_their_steps():
    found = [
        CheckpointFile("u", path, 1, 1.0, "r")
        for path in ("/r/step_10.pt", "/r/step_9.pt", "/r/a2.pt", "/r/a10.pt", "/r/step_100.pt")
    ]
    (run,) = by_run(found)
    assert [file.path[3:-3] for file in run] == ["a2", "a10", "step_9", "step_10", "step_100"]


def test_every_so_many_of_each_run():
    assert names(every(files(2, 5), 2)) == ["/r0/0", "/r0/2", "/r0/4", "/r1/0", "/r1/2", "/r1/4"]
    assert len(every(files(2, 5), 1)) == 10


@pytest.mark.parametrize(
    ("runs", "steps", "batch"), [(3, 7, 4), (1, 9, 4), (10, 3, 4), (5, 1, 64), (7, 20, 16)]
)
def test_runs_go_side_by_side(runs, steps, batch):
    ordered = interleaved(files(runs, steps), batch)
    assert sorted(names(ordered)) == sorted(names(files(runs, steps)))
    for run in {file.folder for file in ordered}:
        own = [int(file.path.split("/")[2][:-3]) for file in ordered if file.folder == run]
        assert own == sorted(own)
    batches = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    cold, known = 0, set()
    for members in batches:
        cold += sum(file.folder not in known for file in members)
        known = {file.folder for file in members}
    depth = max(1, batch // min(runs, batch))
    assert cold <= runs * (depth + 1)


def test_pieces_keep_runs_together():
    cut = list(pieces(files(5, 6), 13))
    assert sorted(itertools.chain(*map(names, cut))) == sorted(names(files(5, 6)))
    assert [sorted({file.folder for file in piece}) for piece in cut] == [
        ["r0", "r1"],
        ["r2", "r3"],
        ["r4"],
    ]
    assert [len(piece) for piece in pieces(files(1, 30), 13)] == [13, 13, 4]


def test_a_pattern_that_describes_nothing_is_an_error():
    with pytest.raises(ArgumentError, match=r"describes none of 4 paths, for instance not 'file:"):
        Selection.parse("{run}/step_{step:d}.pt", [], 1).described(files(2, 2))
    described = Selection.parse("r{seed:d}/{step:d}.pt", [], 1).described(files(2, 2, step=9))
    assert [dict(file.extra) for file in described][3] == {"seed": 1, "step": 9}
    with pytest.raises(ArgumentError, match="every 0"):
        Selection.parse(None, [], 0)
