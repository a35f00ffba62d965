"""The walks of docs/extending.md, applied to a copy of the tree, built and run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "extending.md"
# A line that says where the block after it goes, then the block.
_STEP = re.compile(
    r"^(?P<new>New file )?`(?P<file>[^`\n]+)`"
    r"(?P<place>, at the end|, (?:after|replace) `(?P<anchor>[^`\n]+)`)?:\n\n"
    r"```\w+\n(?P<block>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROOF = re.compile(r"^It works:\n\n```(?P<language>\w+)\n(?P<block>.*?)^```$", re.M | re.DOTALL)


@dataclass(frozen=True)
class Walk:
    """A section of the page."""

    title: str
    text: str

    @property
    def steps(self) -> list[re.Match[str]]:
        """What it writes, and where."""
        return list(_STEP.finditer(self.text))

    def apply(self, tree: Path) -> None:
        """Write it."""
        for step in self.steps:
            _write(tree / step["file"], step)


def _write(path: Path, step: re.Match[str]) -> None:
    if step["new"]:
        assert not path.exists(), f"{path} is there already"
        path.write_text(step["block"])
        return
    text = path.read_text()
    if step["anchor"] is None:
        path.write_text(text + "\n\n" + step["block"])
        return
    lines = text.splitlines(keepends=True)
    (found,) = [i for i, line in enumerate(lines) if line.rstrip("\n") == step["anchor"]]
    kept = found if "replace" in step["place"] else found + 1
    path.write_text("".join([*lines[:kept], step["block"], *lines[found + 1 :]]))


def walks() -> Iterator[Walk]:
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        yield Walk(title, text)


def run(command: list[str], tree: Path) -> None:
    # The copy's package comes first on the path, not the one that is installed here.
    environment = {**os.environ, "PYTHONPATH": str(tree), "MAX_JOBS": str(os.cpu_count() or 1)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def prove(walk: Walk, tree: Path) -> None:
    (proof,) = _PROOF.finditer(walk.text)
    if proof["language"] == "python":
        run([sys.executable, "-c", proof["block"]], tree)
        return
    for line in proof["block"].splitlines():
        command = line.removeprefix("$ ").split()
        if command == ["make", "build"]:  # the environment is there; only the extension is built
            command = ["python", "setup.py", "-q", "build_ext", "--inplace"]
        run([sys.executable, *command[1:]] if command[0] == "python" else command, tree)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree and the extension that is built here, with all walks applied."""
    target = tmp_path_factory.mktemp("walks") / "lipfast"
    left_out = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, target, ignore=left_out)
    for walk in walks():
        walk.apply(target)
    return target


def test_every_walk_writes_and_proves_something() -> None:
    found = list(walks())
    assert len(found) == 5
    for walk in found:
        assert walk.steps, walk.title
        assert len(list(_PROOF.finditer(walk.text))) == 1, walk.title
        blocks = len(re.findall(r"^```\w+$", walk.text, re.MULTILINE))
        assert blocks == len(walk.steps) + 1, f"{walk.title}: a block is unused"


@pytest.mark.long
@pytest.mark.parametrize("walk", list(walks()), ids=lambda walk: walk.title)
def test_walk(walk: Walk, tree: Path) -> None:
    prove(walk, tree)
    tests = dict.fromkeys(step["file"] for step in walk.steps if step["file"].startswith("tests/"))
    if tests:
        run([sys.executable, "-m", "pytest", "-q", *tests], tree)


@pytest.mark.long
@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "mypy"])
def test_lint_of_the_tree_with_all_walks(command: str, tree: Path) -> None:
    if importlib.util.find_spec(command.split(maxsplit=1)[0]) is None:
        pytest.skip(f"{command.split(maxsplit=1)[0]} is not installed: make lint installs it")
    run([sys.executable, "-m", *command.split()], tree)
