"""Scoring by this tree and by others of the project, such as an earlier commit, in turn.

    git worktree add ../earlier COMMIT && (cd ../earlier && python setup.py build_ext --inplace)
    python -m bench.commits ../earlier

Each turn is a process in the tree, so that it imports that tree's lipfast, which scores the archive
once to warm up and then five times; a figure is the median over all calls of all turns. Beside it
stands the processor's time, which other work on the machine disturbs less. Archives: the shapes of
the demo with random weights, and `real`, 300 networks of 40-256-256-10 with 1,000 samples.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from bench.bench_scoring import random_archive
from experiments.models import fcn

TURNS = 3
_SCORE = """
import sys, tempfile, time
sys.path.insert(0, ".")
import lipfast

archive, data = sys.argv[1:]
for turn in range(6):
    with tempfile.TemporaryDirectory() as out:
        started, own = time.perf_counter(), time.process_time()
        summary = lipfast.score(archive, arch="experiments.models:fcn", data=data, out=out)
        taken = time.perf_counter() - started, time.process_time() - own
    if turn:
        print(summary.scored, *taken)
"""


def deep_archive(folder: Path, checkpoints: int = 300) -> None:
    """Write an archive of 40-256-256-10 networks with random weights, and 1,000 samples."""
    generator = torch.Generator().manual_seed(0)
    save_file({"x_train": torch.randn(1000, 40, generator=generator)}, folder / "data.safetensors")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for index in range(checkpoints):
            run = folder / "checkpoints" / f"run-{index % 20}"
            run.mkdir(parents=True, exist_ok=True)
            metadata = {"run": run.name, "step": str(index // 20), "width": "256", "depth": "2"}
            path = run / f"step_{index // 20:06d}.safetensors"
            save_file(fcn(256, 2).state_dict(), path, metadata)


ARCHIVES = {"demo": random_archive, "real": deep_archive}


def score(tree: Path, archive: Path) -> list[tuple[int, float, float]]:
    """Score an archive by the lipfast of a tree: checkpoints, seconds, processor's seconds."""
    command = [sys.executable, "-c", _SCORE]
    command += [f"{archive / 'checkpoints'}", f"{archive / 'data.safetensors'}:x_train"]
    done = subprocess.run(command, cwd=tree, check=True, stdout=subprocess.PIPE, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(int(count), float(wall), float(own)) for count, wall, own in rows]


def compare(trees: list[Path], archive: Path, turns: int) -> Table:
    """Score an archive by each tree in turn; ratios are to the first of them."""
    taken: dict[Path, list[tuple[int, float, float]]] = {tree: [] for tree in trees}
    for _ in range(turns):
        for tree in trees:
            taken[tree] += score(tree, archive)
    counts = {count for rows in taken.values() for count, _, _ in rows}
    if len(counts) != 1:
        raise RuntimeError(f"the trees scored {sorted(counts)} checkpoints")
    table = Table("tree", "seconds", "ratio", "processor's", "ratio")
    medians = {
        tree: [statistics.median(column) for column in list(zip(*rows, strict=True))[1:]]
        for tree, rows in taken.items()
    }
    wall, own = medians[trees[0]]
    for tree, (other_wall, other_own) in medians.items():
        ratios = f"{other_wall / wall:.2f}", f"{other_own / own:.2f}"
        table.add_row(tree.name, f"{other_wall:.3f}", ratios[0], f"{other_own:.3f}", ratios[1])
    table.caption = f"{counts.pop()} checkpoints, medians of {len(taken[trees[0]])} calls"
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, nargs="+", help="folder of a built checkout")
    parser.add_argument("--archive", choices=list(ARCHIVES), default="demo")
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    trees = [Path.cwd(), *(tree.resolve() for tree in options.tree)]
    with tempfile.TemporaryDirectory() as folder:
        ARCHIVES[options.archive](Path(folder))
        Console().print(compare(trees, Path(folder), options.turns))


if __name__ == "__main__":
    main()
