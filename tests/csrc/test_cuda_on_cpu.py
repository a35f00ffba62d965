"""The shim finds planted bugs, and passes the same kernels without them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.harness import Harness, Result

THREADS = 64
SEEDS = range(1, 5)
VALUES = np.arange(THREADS, dtype=np.float64)
REVERSE, SHARED_WRITE, GLOBAL_WRITE, MASK, LANES, COPY, BARRIERS = range(7)
COUNT, WARP, BLOCKS, NEIGHBOUR_COPY = range(7, 11)


def run(harness: Harness, which: int, *, bug: bool, seed: int = 1) -> Result:
    return harness.run("planted", [[which, bug, seed], VALUES])


def values(result: Result) -> np.ndarray:
    return result.take((np.float64, THREADS))[0]


@pytest.mark.parametrize("build", ["plain", "races", "sanitized"])
def test_kernels_without_bugs_pass(build: str, request: pytest.FixtureRequest) -> None:
    harness: Harness = request.getfixturevalue(build)
    for seed in SEEDS:
        assert (values(run(harness, REVERSE, bug=False, seed=seed)) == VALUES[::-1]).all()
        assert (values(run(harness, BARRIERS, bug=False, seed=seed)) == VALUES[::-1]).all()
        assert (values(run(harness, COPY, bug=False, seed=seed)) == VALUES).all()
        assert (values(run(harness, GLOBAL_WRITE, bug=False, seed=seed)) == 1).all()
        assert run(harness, SHARED_WRITE, bug=False, seed=seed).status == 0
        assert values(run(harness, COUNT, bug=False, seed=seed))[0] == THREADS
        assert (values(run(harness, BLOCKS, bug=False, seed=seed))[:2] == 1).all()
        swapped = VALUES.reshape(-1, 2)[:, ::-1].ravel()
        assert (values(run(harness, WARP, bug=False, seed=seed)) == swapped).all()
        assert (values(run(harness, NEIGHBOUR_COPY, bug=False, seed=seed)) == swapped).all()
        sums = values(run(harness, MASK, bug=False, seed=seed))
        assert (sums == np.repeat([VALUES[:32].sum(), VALUES[32:].sum()], 32)).all()


def test_a_removed_barrier_shows(plain: Harness) -> None:
    for seed in SEEDS:
        wrong = values(run(plain, REVERSE, bug=True, seed=seed))
        assert not (wrong == VALUES[::-1]).all()
        assert np.isnan(wrong).any()  # shared memory that nobody had written: poison


@pytest.mark.parametrize(
    "which",
    [REVERSE, COPY, COUNT, WARP, BLOCKS, NEIGHBOUR_COPY],
    ids=["barrier", "wait", "lost update", "warp", "blocks", "wait after the barrier"],
)
def test_a_race_shows_under_every_order(races: Harness, which: int) -> None:
    for seed in SEEDS:
        result = run(races, which, bug=True, seed=seed)
        assert result.status != 0
        assert "race at" in result.message
        # A copy is met on its way or, by another thread, after it has landed.
        copied = which in (COPY, NEIGHBOUR_COPY) and "unawaited copy" in result.message
        assert copied or "no barrier between" in result.message


@pytest.mark.parametrize("which", [SHARED_WRITE, GLOBAL_WRITE], ids=["shared", "global"])
def test_a_write_out_of_range_shows(sanitized: Harness, which: int) -> None:
    result = run(sanitized, which, bug=True)
    assert result.status != 0
    assert "heap-buffer-overflow" in result.message
    assert "WRITE of size 8" in result.message


def test_a_wrong_shuffle_mask_shows(plain: Harness) -> None:
    for seed in SEEDS:
        result = run(plain, MASK, bug=True, seed=seed)
        assert result.status != 0
        assert "__shfl_xor_sync" in result.message
        assert "leaves out the calling lane" in result.message


def test_a_lane_outside_the_mask_is_poison(plain: Harness) -> None:
    right = values(run(plain, LANES, bug=False))
    assert (right[:8] == VALUES[:8] + VALUES[8:16]).all()
    assert np.isnan(values(run(plain, LANES, bug=True))[:16]).all()


def test_a_missing_wait_for_a_copy_shows(plain: Harness) -> None:
    assert np.isnan(values(run(plain, COPY, bug=True))).all()


def test_divergent_barriers_show(plain: Harness) -> None:
    for seed in SEEDS:
        result = run(plain, BARRIERS, bug=True, seed=seed)
        assert result.status != 0
        assert "wait at __syncthreads in lines" in result.message


def test_runs_repeat(plain: Harness) -> None:
    once = values(run(plain, REVERSE, bug=True, seed=7))
    again = values(run(plain, REVERSE, bug=True, seed=7))
    assert np.array_equal(once, again, equal_nan=True)
    assert not np.array_equal(once, values(run(plain, REVERSE, bug=True, seed=8)), equal_nan=True)
