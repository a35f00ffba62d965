"""Certified upper bounds beside the product of norms and what others compute: how tight, how long.

By itself, with those of residual networks: ``python -m bench.bench_tight_bounds``. Solvers and
packages of others are measured where they are installed (`bench/lipschitz_peers.py`), ACAS Xu's
networks where the environment says where they are (`bench/published.py`). A bar is what is to be
reached; timing never decides a test, so nothing fails where a bar is missed.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lipfast
from bench import archive
from bench.bench_scoring import DEMO
from bench.lipschitz_peers import CLARABEL, ECLIPSE_FAST, LIPSCHITZ_PEERS, peer_or_skip
from bench.published import ECLIPSE, MNIST, NO_ACAS, RANDOM, Networks, StateDict, acas, published
from bench.turns import PRODUCT, Benchmark, in_turn, measure, measure_bounds
from experiments.data.generated import INPUTS
from experiments.models import fcn
from lipfast.estimators.upper.quadratic.certificate import Multipliers
from lipfast.estimators.upper.spectral_product import upper_bounds_together

QUADRATIC = tuple(f"quadratic, effort {effort}" for effort in (1, 2, 3))
SECONDS_OF_A_TURN = 0.05  # short calls are repeated


def upper_of(networks: Networks, implementation: str) -> list[lipfast.UpperBound]:
    """One call for all."""
    plan, state_dicts = networks
    if implementation == PRODUCT:
        return plan.upper(state_dicts)
    return plan.upper(state_dicts, method="quadratic", effort=int(implementation[-1]))


def measure_calls(
    benchmark: Benchmark,
    case: str,
    implementation: str,
    call: Callable[[], object],
    *,
    networks: int = 1,
    bar: str = "",
) -> None:
    """Short calls, as often as a turn needs."""
    call()
    started = time.perf_counter()
    call()
    count = max(1, round(SECONDS_OF_A_TURN / (time.perf_counter() - started)))
    work = (lambda: [call() for _ in range(count)][-1]), count * networks
    measure_bounds(benchmark, case, implementation, work, bar=bar)


# Networks that others published

BARS = {RANDOM: "<= 36.52", ECLIPSE: "<= 0.740", MNIST: "<= 24.45"}
SLOW_PEERS = set(LIPSCHITZ_PEERS) - {ECLIPSE_FAST}


@in_turn(PRODUCT, *QUADRATIC, *LIPSCHITZ_PEERS, once=SLOW_PEERS)
@pytest.mark.parametrize("name", BARS)
def bench_published(benchmark: Benchmark, name: str, turn: int, implementation: str) -> None:
    found = published(name)
    if implementation not in LIPSCHITZ_PEERS:
        bar = BARS[name] if implementation == QUADRATIC[1] else ""
        call = partial(upper_of, found, implementation)
        measure_calls(benchmark, name, implementation, call, bar=bar)
        return
    peer, weights = peer_or_skip(implementation), found.weights()
    if implementation == CLARABEL and name == MNIST:
        pytest.skip(f"{CLARABEL}: one matrix of 834 rows takes it hours")
    if implementation not in SLOW_PEERS:
        measure_calls(benchmark, name, implementation, lambda: peer(weights))
        return
    measure_bounds(benchmark, name, implementation, ((lambda: peer(weights)), 1))
    if implementation == CLARABEL:
        benchmark.extra_info["note"] = beside_a_solver(found, benchmark)


def beside_a_solver(networks: Networks, solver: Benchmark) -> str:
    """The solver's value and time beside those of the longest search, right after it."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        (found,) = upper_of(networks, QUADRATIC[2])
        times.append(time.perf_counter() - started)
    apart = abs(found.log_value - solver.extra_info["log_bound"])
    ratio = solver.stats.stats.median / statistics.median(times)
    return (
        f"{CLARABEL} and effort 3 are {apart:.1g} apart (bar 1e-4), "
        f"the solver takes {ratio:,.0f} times as long (bar 100)"
    )


def acas_or_skip() -> Networks:
    found = acas()
    if found is None:
        pytest.skip(NO_ACAS)
    return found


@in_turn(PRODUCT, *QUADRATIC, ECLIPSE_FAST)
def bench_acas(benchmark: Benchmark, turn: int, implementation: str) -> None:
    """All networks in one call; the peer takes one after the other."""
    found = acas_or_skip()
    count = len(found.state_dicts)
    call: Callable[[], object] = partial(upper_of, found, implementation)
    if implementation in LIPSCHITZ_PEERS:
        peer, weights = peer_or_skip(implementation), [found.weights(i) for i in range(count)]
        call = lambda: [peer(own) for own in weights]  # noqa: E731
    bar = ">= 100 below, <= 40x" if implementation == QUADRATIC[1] else ""
    case = f"{count} networks of ACAS Xu, 5-50x6-5"
    measure_calls(benchmark, case, implementation, call, networks=count, bar=bar)


@in_turn(PRODUCT, "interval Jacobian")
@pytest.mark.parametrize(("norm", "least"), [(1, "1,400"), (math.inf, "700")])
def bench_acas_other_norms(
    benchmark: Benchmark, norm: float, least: str, turn: int, implementation: str
) -> None:
    """The published product, and the bound that takes its place."""
    found = acas_or_skip()
    plain = implementation == PRODUCT
    call = partial(found.plan.upper, found.state_dicts, norm=norm, simplify=not plain)
    bar = "" if plain else f">= {least} below, <= 1x"
    count = len(found.state_dicts)
    case = f"{count} networks of ACAS Xu, norm {norm}"
    measure_calls(benchmark, case, implementation, call, networks=count, bar=bar)


# Checkpoints of runs

RUNS, EACH = 20, 51


class Runs(NamedTuple):
    """Checkpoints of runs, in order; the first of each is only what the second starts from."""

    plan: lipfast.Plan
    runs: list[list[StateDict]]

    @property
    def later(self) -> list[StateDict]:
        """All that have one before them, run after run."""
        return [own for run in self.runs for own in run[1:]]

    @property
    def earlier(self) -> list[StateDict]:
        """Those before them."""
        return [own for run in self.runs for own in run[:-1]]


@cache
def runs() -> Runs:
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(
            archive.train_archive(Path(folder), RUNS * EACH, RUNS).rglob("*.safetensors")
        )
        found = [load_file(path) for path in paths]
    plan = lipfast.compile(fcn(archive.WIDTH, archive.DEPTH), torch.zeros(1, INPUTS))
    return Runs(plan, [found[i : i + EACH] for i in range(0, len(found), EACH)])


@cache
def found_before() -> list[Multipliers | None]:
    """What the checkpoints before leave to start from."""
    plan, earlier = runs().plan, runs().earlier
    found = upper_bounds_together(plan, earlier, method="quadratic", effort=1)
    return [found.warm_start(network) for network in range(len(earlier))]


def cold(implementation: str) -> list[lipfast.UpperBound]:
    return upper_of(Networks(runs().plan, runs().later), implementation)


def warm() -> list[lipfast.UpperBound]:
    """Each from what the checkpoint before it had found, one call."""
    found = upper_bounds_together(
        runs().plan, runs().later, method="quadratic", effort=1, warm=found_before()
    )
    return [found.of(network) for network in range(len(found))]


def tracked(method: Literal["product", "quadratic"]) -> list[lipfast.UpperBound]:
    """A tracker for each run, one checkpoint after the other."""
    found: list[lipfast.UpperBound] = []
    for run in runs().runs:
        tracker = runs().plan.tracker(method=method, effort=1)
        tracker.upper(run[0])
        found += [tracker.upper(own) for own in run[1:]]
    return found


OF_RUNS: dict[str, tuple[Callable[[], object], str]] = {
    PRODUCT: (partial(cold, PRODUCT), ""),
    "quadratic, cold (effort 1)": (partial(cold, QUADRATIC[0]), "<= 12x"),
    "quadratic, warm, one call": (warm, "<= 4x"),
    "product, trackers": (partial(tracked, "product"), ""),
    "quadratic, trackers": (partial(tracked, "quadratic"), ""),
}


@in_turn(*OF_RUNS, turns=3)
def bench_checkpoints_of_runs(benchmark: Benchmark, turn: int, implementation: str) -> None:
    runs(), found_before()
    call, bar = OF_RUNS[implementation]
    case = f"{RUNS * (EACH - 1):,} checkpoints of {RUNS} runs of 40-256-256-10"
    measure_bounds(benchmark, case, implementation, (call, RUNS * (EACH - 1)), bar=bar, warmup=True)


# Large networks

LARGE = (512, 1024, 2048)


@cache
def large(n: int) -> Networks:
    torch.manual_seed(0)
    sizes = 784, n, n, 10
    first, *rest = (nn.Linear(before, after) for before, after in pairwise(sizes))
    model = nn.Sequential(first, *(part for layer in rest for part in (nn.ReLU(), layer)))
    return Networks(lipfast.compile(model, torch.zeros(1, 784)), [model.state_dict()])


@in_turn(PRODUCT, QUADRATIC[0], turns=3)
@pytest.mark.parametrize("n", LARGE)
def bench_large_networks(benchmark: Benchmark, n: int, turn: int, implementation: str) -> None:
    networks = large(n)
    work = partial(upper_of, networks, implementation), 1
    bar = "< 20 s" if (n, implementation) == (LARGE[-1], QUADRATIC[0]) else ""
    measure_bounds(benchmark, f"784-{n}-{n}-10", implementation, work, bar=bar)


def resident(what: str) -> float:
    """MiB that the process holds, "VmRSS", or held at most, "VmHWM"."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def spent(n: int) -> tuple[float, float]:
    """Median seconds of three calls, and MiB beyond what was held before.

    For a process of its own.
    """
    torch.set_num_threads(min(2, torch.get_num_threads()))
    upper_of(large(64), QUADRATIC[0])
    networks = large(n)
    Path("/proc/self/clear_refs").write_text("5")  # what was held at most is counted anew
    before, times = resident("VmRSS"), [time.perf_counter()]
    for _ in range(3):
        upper_of(networks, QUADRATIC[0])
        times.append(time.perf_counter())
    seconds = statistics.median(after - start for start, after in pairwise(times))
    return seconds, resident("VmHWM") - before


def bench_growth(benchmark: Benchmark) -> None:
    """Exponents of time and memory from one size to its double, each in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of the memory is read from /proc, which Linux has")
    found = []

    def measured() -> None:
        for n in LARGE:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found.append(pool.submit(spent, n).result())

    case = f"784-n-n-10, n = {', '.join(map(str, LARGE))}, effort 1, in processes of their own"
    measure(benchmark, case, "all of them", (measured, 1), warmup=False)
    columns = list(zip(*found, strict=True))
    exponents = [[math.log2(after / before) for before, after in pairwise(c)] for c in columns]
    said = ["; ".join(f"{value:.3g}" for value in own) for own in (*columns, *exponents)]
    benchmark.extra_info["note"] = (
        f"{said[0]} s, n to the {said[2]} (bar 3); {said[1]} MiB, n to the {said[3]} (bar 2)"
    )


# The demo's archive


class Ratios(NamedTuple):
    """Upper over lower bound: of all checkpoints, and of the last of each run."""

    all: list[float]
    last: list[float]

    def __str__(self) -> str:
        said = [f"{statistics.geometric_mean(own):.3f}, at most {max(own):.3f}" for own in self]
        return (
            f"upper / lower at the last checkpoints {said[1]} (bars 1.20, 1.55), "
            f"at all {said[0]} (1.25, 2.3)"
        )


def scored(upper: Literal["product", "quadratic"]) -> Ratios:
    with tempfile.TemporaryDirectory() as out:
        lipfast.score(
            DEMO / "checkpoints",
            arch=archive.ARCHITECTURE,
            data=f"{DEMO / 'data.safetensors'}:x_train",
            upper=upper,
            out=out,
        )
        rows = lipfast.read_scores(out).to_pylist()
    of_runs = {row["run"]: row["upper"] / row["lower"] for row in rows}  # by step within a run
    return Ratios([row["upper"] / row["lower"] for row in rows], list(of_runs.values()))


@in_turn(PRODUCT, "quadratic", turns=3)
def bench_scoring_the_demo(benchmark: Benchmark, turn: int, implementation: str) -> None:
    """How long scoring takes with either upper bound, and how wide the bracket is."""
    if not (DEMO / "checkpoints").exists():
        pytest.skip(f"there is no {DEMO}: make demo")
    plain = implementation == PRODUCT
    found: list[Ratios] = []

    def ratios() -> list[float]:
        found.append(scored("product" if plain else "quadratic"))
        return found[-1].all

    count = len(list((DEMO / "checkpoints").rglob("*.safetensors")))
    case = f"scoring the demo, {count} checkpoints: upper / lower"
    bar = "" if plain else "<= 1.25, <= 2.5x"
    measure_bounds(benchmark, case, implementation, (ratios, count), bar=bar, warmup=True)
    if not turn:
        benchmark.extra_info["note"] = f"{implementation}, {found[-1]}"


if __name__ == "__main__":
    here = Path(__file__)
    options = ["--benchmark-only", "--benchmark-quiet", "-q", "--no-header"]
    options += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
    files = [str(here), str(here.with_name("bench_graph_quadratic.py"))]
    sys.exit(pytest.main([*options, *sys.argv[1:], *files]))
