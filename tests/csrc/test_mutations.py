"""The tests of test_kernels.py notice every change of mutations.py, one at a time.

A barrier, a wait or a lane mask that no test misses is either not needed or not tested.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import pytest

from tests.csrc import test_kernels as tested
from tests.csrc import test_secant_kernels as secants
from tests.csrc.test_kernels import DTYPES
from tests.support.harness import KERNELS, ROOT, Harness, build_programs, compiler, fingerprint
from tests.support.mutations import Mutation, plant

pytestmark = pytest.mark.long


def planted() -> list[Mutation]:
    with tempfile.TemporaryDirectory() as folder:
        return plant(KERNELS, Path(folder) / "kernels")


@pytest.fixture(scope="module")
def mutants() -> dict[str, Path]:
    """The builds with all changes in them."""
    if compiler() is None:
        pytest.skip("no C++ compiler: kernel bodies cannot be compiled for the CPU")
    folder = ROOT / "build" / "cuda_on_cpu" / f"mutants-{fingerprint()}"
    sources = folder / "kernels"
    if not sources.exists():
        plant(KERNELS, sources)
    return build_programs(folder, sources)


Case = Callable[[Harness], None]


def each(test: Callable[..., None], *parameters: Sequence[object]) -> list[Case]:
    """The test with every combination of parameters, the last ones in turn first."""
    return [
        lambda harness, chosen=chosen: test(harness, *chosen)  # type: ignore[misc]
        for chosen in product(*parameters)
    ]


def reduction_cases() -> list[Case]:
    return [
        *each(tested.test_jacobian_reduction, DTYPES, sorted(tested.JACOBIANS, key=math.prod)),
        *each(tested.test_jacobian_reduction_of_degenerate_spectra),
    ]


def spectral_cases() -> list[Case]:
    return [
        *each(tested.test_spectral_norms_by_power_iteration),
        *each(tested.test_spectral_norms_of_extreme_matrices),
        *each(tested.test_spectral_norms_start_where_they_are_told),
        *each(tested.test_blocks_pass_over_matrices_that_they_do_not_hold),
        *each(tested.test_spectral_norms_of_many_matrices),
        *each(tested.test_spectral_norms_of_stacked_networks, [0, 16000]),
        *each(tested.test_spectral_norms),
        *each(tested.test_extreme_matrices_that_a_block_holds),
        *each(tested.test_spectral_norms_of_matrices_that_a_block_holds, tested.SHARED.values()),
    ]


def chain_cases() -> list[Case]:
    dims = sorted(tested.CHAINS, key=sum)
    return [
        *each(tested.test_chain_kinks_nan_and_dead_networks),
        *each(tested.test_chain_of_a_dead_layer_above_a_wide_one, DTYPES),
        *each(tested.test_chain_of_sliced_weights),
        *each(tested.test_chain_on_tensor_cores, tested.SMOOTH),
        *each(tested.test_weights_beyond_the_range_of_tensor_cores, tested.SCALES),
        *each(tested.test_chain_jacobian_norms, DTYPES, dims[:6]),
        *each(tested.test_chain_batches, tested.BATCHES),
        *each(tested.test_chain_jacobian_norms, DTYPES, dims[6:]),
    ]


def hermitian_cases() -> list[Case]:
    return each(tested.test_hermitian_residual, tested.HERMITIANS)


def tap_cases() -> list[Case]:
    return each(tested.test_tap_products, tested.KERNELS)


def gram_cases() -> list[Case]:
    return each(tested.test_symbol_grams, [*tested.KERNELS, tested.LONG_KERNEL])


def secant_cases() -> list[Case]:
    return [
        *each(secants.test_points_lie_where_the_jacobian_stretches_most, ["wide"], [2, 1]),
        *each(
            secants.test_secants_of_chains, ["more inputs", "more outputs", "clipped"], DTYPES[:1]
        ),
        *each(secants.test_what_cannot_be_proved),
    ]


def certificate_cases() -> list[Case]:
    return [
        *each(tested.test_certificates, tested.CERTIFIED, [False, True], DTYPES),
        *each(tested.test_certificates_of_extreme_matrices),
        *each(tested.test_bounds_from_any_factor, tested.CERTIFIED),
    ]


BESIDE = {
    "hermitian_residual.cuh": hermitian_cases,
    "factor_residual.cuh": lambda: hermitian_cases() + certificate_cases(),
    "tile_products.cuh": lambda: hermitian_cases() + certificate_cases() + tap_cases(),
    "shifted_grams.cuh": certificate_cases,
    "cholesky_bounds.cuh": certificate_cases,
    "tap_products.cuh": tap_cases,
    "symbol_grams.cuh": gram_cases,
}


def cases(file: str) -> list[Case]:
    """The tests of the kernels that use a file, quick ones first."""
    if file.startswith("secant_"):
        return secant_cases()
    if file.startswith("chain_"):
        return chain_cases()
    if file in ("lanczos.cuh", "matrix.cuh") or file.startswith("spectral_"):
        return spectral_cases()
    if file in BESIDE:
        return BESIDE[file]()
    reduction = reduction_cases() + chain_cases()
    if file in ("jacobian_reduction.cuh", "warp_reduce.cuh"):
        return reduction
    certificates = hermitian_cases() + certificate_cases()
    return reduction + spectral_cases() + certificates + secant_cases()


def noticed(harness: Harness, tests: list[Case]) -> bool:
    """Whether a test fails. One order of threads: races do not depend on it."""

    def fails(case: Case) -> bool:
        try:
            case(harness)
        except AssertionError:
            return True
        return False

    return any(fails(case) for case in tests)


@pytest.fixture
def one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "ORDERS", (1,))


def test_nothing_is_noticed_without_a_change(mutants: dict[str, Path], one_order: None) -> None:
    assert not noticed(Harness(mutants.get("races", mutants["plain"])), cases("device.cuh"))


@pytest.mark.parametrize("mutation", planted(), ids=str)
def test_a_change_is_noticed(mutation: Mutation, mutants: dict[str, Path], one_order: None) -> None:
    if "races" not in mutants:
        pytest.skip("the compiler has no -fsanitize=thread: races are not looked for")
    found = noticed(Harness(mutants["races"], mutation.number), cases(mutation.file))
    assert found, f"nothing notices {mutation}: {mutation.text}"
