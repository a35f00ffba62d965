"""All that a machine with a GPU can say of the kernels, in ten minutes and one file.

``make gpu-day``. Build for the device's architecture, bound symbols, tests, tables against torch on
the same GPU and against limits measured there, the sanitizers, Nsight Compute: what matters first,
each step within a time of its own and all within one. Needs no network, installs nothing, makes no
environment: torch, numpy, pybind11, ninja, pyarrow, safetensors and pytest must be importable, and
nvcc on the path. A step that fails or is stopped leaves what it printed, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = ("torch", "numpy", "pybind11", "ninja", "pyarrow", "safetensors", "pytest")
MINUTES = 9.5  # what lends a machine for ten minutes ends the command then
PACKING = 5.0  # seconds that are kept for the archive
MOST = 16 << 20  # bytes of it
# Of a log: the beginning tells what failed first, the end what was concluded.
MOST_OF_A_LOG = 1 << 20
SUMMARY = "summary.tsv"
INTERRUPTED = "interrupted"
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Step:
    """One program, with a limit of its own.

    Attributes:
        name: of its log, too.
        command: its words.
        seconds: it is stopped after these.
        required: nothing after it would say anything if it fails.
        program: what has to be installed, or the step is left out.
        report: name of a file that it writes beside its log.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    required: bool = False
    program: str | None = None
    report: str | None = None

    def files(self, out: Path) -> list[Path]:
        """All that it writes."""
        return [out / name for name in (f"{self.name}.log", self.report) if name is not None]


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    said: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it ended by itself, without an error."""
        return self.said == "passed"


def steps(out: Path, python: str = sys.executable) -> list[Step]:
    """All of them, in the order of what they are worth; the limits add up to the whole."""
    small = (python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider")
    once = (python, "-m", "bench.gpu", "--once")
    # torch's own kernels are not what is asked about, and take the sanitizers' time.
    sanitizer = ("compute-sanitizer", "--kernel-name", "kns=lipfast", "--error-exitcode", "1")

    def sanitized(tool: str, seconds: float) -> Step:
        command = (*sanitizer, "--tool", tool, *small, "-k", "small")
        return Step(tool, command, seconds, program="compute-sanitizer")

    profile = ("ncu", "--clock-control", "none", "--set", "full", "--kernel-name-base", "mangled")
    report = ("-k", "regex:lipfast", "-f", "-o", str(out / "kernels"), *once)
    build = (python, "setup.py", "-q", "build_ext", "--inplace")
    return [
        Step("build", build, 150, required=True),
        Step("symbols", (python, "tests/check_cuda_build.py"), 15, required=True),
        Step("tests", (*small, "-rs"), 85),
        Step("against-torch", (python, "-m", "bench.gpu_against_torch"), 105),
        Step("limits", (python, "-m", "bench.gpu"), 40),
        sanitized("memcheck", 45),
        sanitized("racecheck", 45),
        sanitized("synccheck", 35),
        Step("profile", (*profile, *report), 45, program="ncu", report="kernels.ncu-rep"),
    ]


def environment() -> dict[str, str]:
    """The caller's, with the device's own architecture to build for unless one is named.

    This Python's programs come first on the path: torch's build looks for ninja there.
    """
    made = {
        "LIPFAST_CUDA": "1",
        "MAX_JOBS": str(os.cpu_count() or 1),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path.cwd()), os.getenv("PYTHONPATH")])),
    }
    found = capability()
    if found is not None:
        made["TORCH_CUDA_ARCH_LIST"] = found
    theirs = {k: v for k, v in os.environ.items() if k not in {"PATH", "PYTHONPATH"}}
    return {**made, **theirs}


def capability() -> str | None:
    """Compute capability of the first device, such as ``9.0``; None where there is none."""
    asked = (
        "import torch; "
        "print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')"
    )
    # In a process of its own: a context here would take the device's memory from the steps.
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None


def run(step: Step, seconds: float, out: Path, variables: dict[str, str]) -> Outcome:
    """Run a step for so many seconds at most; what it printed is in ``NAME.log``."""
    for earlier in step.files(out):
        earlier.unlink(missing_ok=True)
    if step.program is not None and shutil.which(step.program) is None:
        return Outcome(step, f"left out: {step.program} is not installed", 0.0)
    if seconds <= 0:
        return Outcome(step, "left out: no time was left", 0.0)
    started = time.monotonic()
    with (out / f"{step.name}.log").open("wb") as log:
        process = subprocess.Popen(
            step.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
            said = "passed" if code == 0 else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            said = f"stopped after {seconds:.0f} s"
        finally:
            # Children too: a sanitizer's program outlives it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(step, said, time.monotonic() - started)


def go(todo: Sequence[Step], out: Path, seconds: float, variables: dict[str, str]) -> list[Outcome]:
    """Run the steps in order within so many seconds in all, and say how each ends.

    An interrupt ends the step that runs, and leaves the others out.
    """
    started = time.monotonic()
    outcomes: list[Outcome] = []
    for step in todo:
        begun = time.monotonic() - started
        sys.stdout.write(f"== {step.name}\n")
        sys.stdout.flush()
        try:
            outcome = run(step, min(step.seconds, seconds - begun), out, variables)
        except KeyboardInterrupt:
            outcome = Outcome(step, INTERRUPTED, time.monotonic() - started - begun)
        outcomes.append(outcome)
        log = out / f"{step.name}.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        shown = lines if step.name in {"against-torch", "limits"} else lines[-4:]
        sys.stdout.writelines(f"   {line}\n" for line in shown)
        sys.stdout.write(f"   {outcome.said}, {outcome.seconds:.0f} s\n")
        if outcome.said == INTERRUPTED or (step.required and not outcome.passed):
            break
    return outcomes


def packed(out: Path, outcomes: Sequence[Outcome], most: int = MOST) -> Path:
    """One archive of what the steps wrote, at most so large.

    The middle of a long log is cut; then what takes most of the archive is left out.
    """
    summary = "".join(f"{o.step.name}\t{o.said}\t{o.seconds:.0f} s\n" for o in outcomes)
    (out / SUMMARY).write_text(summary)
    archive = out / "gpu_day.tar.gz"
    # The folder may hold other things: OUT may be any.
    written = (path for outcome in outcomes for path in outcome.step.files(out))
    files = sorted(path for path in (out / SUMMARY, *written) if path.is_file())
    for path in files:
        if path.suffix == ".log":
            _cut(path)
    left_out: list[str] = []
    while True:
        with tarfile.open(archive, "w:gz") as tar:
            for path in files:
                tar.add(path, path.name)
        if archive.stat().st_size <= most or len(files) <= 1:
            break
        largest = max(files, key=lambda path: len(zlib.compress(path.read_bytes())))
        files.remove(largest)
        left_out.append(largest.name)
    if left_out:
        sys.stdout.write(f"not packed, too large: {', '.join(left_out)}\n")
    return archive


def _cut(log: Path) -> None:
    text = log.read_bytes()
    if len(text) > MOST_OF_A_LOG:
        half = MOST_OF_A_LOG // 2
        log.write_bytes(text[:half] + b"\n... the middle is left out ...\n" + text[-half:])


def missing() -> str | None:
    """What this machine lacks, or None."""
    absent = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"{sys.executable} does not have {', '.join(absent)}"
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return "there is no nvcc on the path, and CUDA_HOME does not name a toolkit"
    if capability() is None:
        return "torch sees no CUDA device (torch.cuda.is_available() is False)"
    return None


def _interrupt(number: int, frame: object) -> None:
    """End the step that runs, once: the archive follows. By default no signal but Ctrl-C would."""
    for each in _ENDS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole run; 0 if every step passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.getenv("OUT") or "runs/gpu-day"))
    parser.add_argument("--minutes", type=float, default=MINUTES, help="in all")
    names = [step.name for step in steps(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these steps")
    given = parser.parse_args(arguments)
    if not 0 < given.minutes < math.inf:
        parser.error(f"argument --minutes: {given.minutes} is not more than 0")
    started = time.monotonic()
    reason = missing()
    if reason is not None:
        sys.stderr.write(f"gpu-day: {reason}\n")
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / SUMMARY).write_text("")
    except OSError as error:
        parser.error(f"argument --out: {error}")
    todo = [step for step in steps(given.out) if step.name in given.only]
    for number in _ENDS:
        signal.signal(number, _interrupt)
    spent = time.monotonic() - started
    outcomes = go(todo, given.out, 60 * given.minutes - PACKING - spent, environment())
    archive = packed(given.out, outcomes)
    sys.stdout.write(f"{time.monotonic() - started:.0f} s in all; everything: {archive}\n")
    return 0 if len(outcomes) == len(todo) and all(o.passed for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
