"""Long campaigns: killed at random moments; memory that does not grow with the archive."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lipfast.scoring import read_scores, score
from lipfast.scoring.compact import compact_store
from lipfast.scoring.verify import verify_store
from tests.support.toy_archive import write_toy

KILLS = 50

# A server forks one scorer per kill: imports and tracing, which take seconds, are done once, so
# that the moments fall into the work itself.
SCORER = """
import os, random, sys, time, torch
torch.set_num_threads(1)
from lipfast.scoring import pipeline, store
from lipfast.scoring.architectures import ModelFamily

archive, out = sys.argv[1:]
store._FIRST_INTERVAL = store._SHARE = 0.002
x = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))

def run(where):
    pipeline.score(archive, arch="lipfast_toy_models:mlp", data=x, out=where, batch_size=4)

run(sys.argv[2] + "-warm-up")
started = time.perf_counter()
run(sys.argv[2] + "-undisturbed")
print(time.perf_counter() - started, flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(out)
        os._exit(0)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


def rubbish(archive: Path) -> None:
    """Some of what archives hold that cannot be scored."""
    for number in range(6):
        (archive / f"rubbish{number}.pt").write_bytes(bytes([number]) * 40)
    write_toy(archive / "nan" / "nan.safetensors", 4, step=1)
    state = {"0.weight": torch.full((4, 4), float("nan"))}
    save_file(state, archive / "nan" / "nan.safetensors", {"width": "4"})


@pytest.mark.long
def test_killed_at_fifty_random_moments(toy_models, samples, tmp_path):
    archive = tmp_path / "archive"
    for run in range(8):
        for step in range(40):
            path = archive / f"run{run}" / f"step{step}.safetensors"
            write_toy(path, (4, 6)[run % 2], seed=100 * run + step, step=step)
    rubbish(archive)
    undisturbed = tmp_path / "undisturbed"
    score(archive, arch=toy_models, data=samples, out=undisturbed, batch_size=4)
    expected = read_scores(undisturbed)

    store = tmp_path / "s"
    kills = kill_often(archive, store)
    assert kills == KILLS
    summary = score(archive, arch=toy_models, data=samples, out=store, batch_size=4)
    assert summary.skipped + summary.scored == 320
    table = read_scores(store)
    assert table["uri"].equals(expected["uri"])  # none lost, none twice
    assert table["status"].equals(expected["status"])
    assert verify_store(store).problems == ()
    assert brackets_overlap(store, undisturbed)
    compact_store(store)
    assert read_scores(store)["uri"].equals(expected["uri"])


def kill_often(archive: Path, store: Path) -> int:
    """Start scorers on one store and kill each; where one ends before, begin a new store."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, "-c", SCORER, str(archive), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    undisturbed = float(server.stdout.readline())  # seconds: machines differ
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        server.stdin.write("go\n")
        server.stdin.flush()
        pid = int(server.stdout.readline())
        time.sleep(moments.uniform(0.0, undisturbed / 8))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed = int(server.stdout.readline()) == -signal.SIGKILL
        kills += killed
        if store.exists() and (store / "schema.json").exists():
            assert verify_store(store).problems == ()
        if not killed:  # everything was done: forget half of it
            for part in sorted(store.glob("part-*"))[::2]:
                part.unlink()
    server.stdin.close()
    assert server.wait(60) == 0
    return kills


def brackets_overlap(store: Path, other: Path) -> bool:
    tables = [
        {(row["uri"], row["index"]): row for row in read_scores(path, "layers").to_pylist()}
        for path in (store, other)
    ]
    assert list(tables[0]) == list(tables[1])
    return all(
        a["lower"] <= b["upper"] and b["lower"] <= a["upper"]
        for a, b in zip(tables[0].values(), tables[1].values(), strict=True)
    )


PEAK = """
import resource, sys, torch
from lipfast.scoring import score
torch.set_num_threads(2)
x = torch.randn(10, 40, generator=torch.Generator().manual_seed(0))
summary = score(sys.argv[1], arch="experiments.models:fcn", data=x, out=sys.argv[2])
print(summary.scored, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_archive(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"0": (256, 40), "2": (256, 256), "4": (10, 256)}
    originals = []
    for number in range(50):
        state = {}
        for name, (rows, columns) in shapes.items():
            state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / 16
            state[f"{name}.bias"] = torch.randn(rows, generator=generator)
        path = tmp_path / f"original{number}.safetensors"
        save_file(state, path, {"width": "256", "depth": "2"})
        originals.append(path)
    peaks = {}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(Path.cwd())])}
    for count in (500, 5000):
        archive = tmp_path / str(count)
        for number in range(count):
            link = archive / f"run{number % 50}" / f"step{number // 50}.safetensors"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(originals[number % 50])
        command = [sys.executable, "-c", PEAK, str(archive), str(tmp_path / f"s{count}")]
        process = subprocess.run(
            command, check=False, capture_output=True, text=True, env=environment
        )
        assert process.returncode == 0, process.stderr
        scored, peaks[count] = map(int, process.stdout.split())
        assert scored == count
    assert peaks[5000] <= 1.1 * peaks[500], peaks
