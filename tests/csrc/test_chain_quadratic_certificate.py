"""The certificate of chain_quadratic for multipliers and rho^2 that were made to break it.

Near-singular blocks and the smallest rho^2 that passes, judged in rational arithmetic. Every term
that is lowered off the diagonal is needed: without it some certificate is false.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.harness import HERE, ROOT, compiler
from tests.support.rationals import Matrix, chain_form, is_positive, rational

# What stands in the certificate -> with a factor that a test can make 0.
SWITCHES = {
    "return row * (error": "return kept(0) * row * (error",
    "add_absolute(w, gamma(n + 8), sums": "add_absolute(w, kept(1) * gamma(n + 8), sums",
    "loss[j] *= kUpwards / size[j]": "loss[j] *= kept(2) * kUpwards / size[j]",
    "weighted[c] *= fabs(curve[c])": "weighted[c] *= kept(3) * fabs(curve[c])",
    "(error, 1, sums, n, next_loss)": "(error, kept(3), sums, n, next_loss)",
    "next_loss[j] += kUpwards * sums[j]": "next_loss[j] += kept(4) * kUpwards * sums[j]",
    "loss[c] += kUpwards * sums[c]": "loss[c] += kept(5) * kUpwards * sums[c]",
    "return v >= kLeastDiagonal": "return v >= kept(6) * kLeastDiagonal",
}
LEFT_OUT = [
    "rounding", "products", "errors of the first", "errors of products",
    "errors of rows", "errors of columns", "range",
]  # fmt: skip


@dataclass
class Chain:
    """A chain with multipliers; errors of the weights or None."""

    weights: list[np.ndarray]
    means: list[np.ndarray]
    products: list[np.ndarray]
    multipliers: list[np.ndarray]
    errors: list[np.ndarray] | None = None

    def form(self, weights: Sequence[Matrix], square: float) -> Matrix:
        """The matrix whose definiteness proves rho^2, with these weights, exactly."""
        units = [
            [[Fraction(float(value)) for value in layer] for layer in layers]
            for layers in (self.means, self.products, self.multipliers)
        ]
        return chain_form(weights, *units, Fraction(square))


def pointers(arrays: Sequence[np.ndarray | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(arrays))(
        *(None if array is None else array.ctypes.data for array in arrays)
    )


class Certificate:
    """The compiled certificate."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def leave_out(self, term: int | None) -> None:
        self._library.leave_out(-1 if term is None else term)

    def proves(self, chain: Chain, square: float) -> bool:
        sizes = [chain.weights[0].shape[1], *(len(weight) for weight in chain.weights)]
        arrays = [chain.weights, chain.errors or [None] * len(chain.weights)]
        arrays += [chain.means, chain.products, chain.multipliers]
        return bool(
            self._library.proves(
                ctypes.c_int64(len(chain.weights)),
                (ctypes.c_int64 * len(sizes))(*sizes),
                *map(pointers, arrays),
                ctypes.c_double(square),
            )
        )

    def smallest(self, chain: Chain) -> float | None:
        """The smallest rho^2 that is proved, by bisection; None where none is."""
        low, high = 0.0, 2.0**200
        if not self.proves(chain, high):
            return None
        for _ in range(100):
            middle = (low * high) ** 0.5 if low > 0 else high / 2**10
            if middle in (low, high) or high < 2.0**-290:
                break
            low, high = (low, middle) if self.proves(chain, middle) else (middle, high)
        return high


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    if compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("certificate")
    shutil.copytree(ROOT / "csrc" / "kernels", folder / "kernels")
    body = folder / "kernels" / "cpu" / "chain_quadratic_certificate-inl.h"
    text = body.read_text()
    for before, after in SWITCHES.items():
        assert before in text, before
        text = text.replace(before, after)
    body.write_text(text)
    library = folder / "certificate.so"
    source = HERE / "chain_quadratic_certificate.cpp"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wno-psabi", "-Wno-unknown-pragmas"]
    command = [compiler() or "c++", *flags, f"-I{folder}", str(source), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return Certificate(library)


def eigenvalues(chain: Chain, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Of the matrix that proves rho^2, in floating point."""
    form = chain.form([rational(weight) for weight in chain.weights], square)
    return np.linalg.eigh(np.array([[float(value) for value in row] for row in form]))


def with_multipliers(
    weights: list[np.ndarray], boxes: Sequence[tuple[float, float]], margin: float,
    rng: np.random.Generator,
) -> Chain:  # fmt: skip
    """Multipliers of random shape, D - K singular but for a margin."""
    chain = Chain(weights, [], [], [])
    below = weights[0] @ weights[0].T
    for weight, (m, p) in zip(weights[1:], boxes, strict=True):
        n = len(below)
        shape = 10.0 ** rng.uniform(-1, 1, n)
        top = np.linalg.eigvalsh(below / np.sqrt(np.outer(shape, shape)))[-1]
        d = shape * top * (1 + margin)
        chain.means.append(np.full(n, m))
        chain.products.append(np.full(n, p))
        chain.multipliers.append(d)
        inner = np.linalg.solve(np.diag(d) - below, np.diag(m * d)) * (m * d)[:, None]
        below = weight @ (inner - np.diag(p * d)) @ weight.T
    return chain


def near_singular(rng: np.random.Generator, boxes: Sequence[tuple[float, float]]) -> Chain:
    sizes = [int(n) for n in rng.integers(1, 5, 4)]
    weights = [
        rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-1, 1, (rows, 1))
        for rows, columns in zip(sizes[1:], sizes[:-1], strict=True)
    ]
    own = [boxes[rng.integers(len(boxes))] for _ in weights[1:]]
    return with_multipliers(weights, own, 10.0 ** rng.uniform(-10, -3), rng)


def cancelling(rng: np.random.Generator) -> Chain:
    """m = 0 and one multiplier after the other just above W p D W^T: the diagonal cancels."""
    return near_singular(rng, [(0.0, -1.0), (2.0**-30, -1.0)])


def with_errors(rng: np.random.Generator, index: int, box: tuple[float, float]) -> Chain:
    """A chain one of whose weights is known to a thousandth only."""
    sizes = [3, 2, 3, 2]
    weights = [rng.standard_normal((n, k)) for n, k in zip(sizes[1:], sizes[:-1], strict=True)]
    chain = with_multipliers(weights, [box] * 2, 0.5, rng)
    chain.errors = [np.zeros_like(weight) for weight in weights]
    chain.errors[index] = 10.0 ** rng.uniform(-4, -2) * np.abs(weights[index])
    return chain


def worst_weights(chain: Chain, square: float) -> list[Matrix]:
    """The weights moved by their errors so that the smallest eigenvalue falls."""
    exact = [rational(weight) for weight in chain.weights]
    if chain.errors is None:
        return exact
    _, vectors = eigenvalues(chain, square)
    parts = np.split(vectors[:, 0], np.cumsum([len(weight) for weight in chain.weights])[:-1])
    for i, (weight, error) in enumerate(zip(chain.weights, chain.errors, strict=True)):
        inner = weight.T @ parts[i]
        if i == 0:
            slope = -np.outer(parts[0], inner)
        else:
            d = chain.multipliers[i - 1]
            slope = np.outer(
                parts[i], chain.means[i - 1] * d * parts[i - 1] + chain.products[i - 1] * d * inner
            )
        exact[i] = [
            [
                value - Fraction(float(own)) * int(sign)
                for value, own, sign in zip(*row, strict=True)
            ]
            for row in zip(exact[i], error, np.sign(slope), strict=True)
        ]
    return exact


def false_certificates(
    certificate: Certificate, made: Callable[[np.random.Generator], Chain], count: int
) -> tuple[int, int]:
    """How many chains were proved, with the smallest rho^2, and how many of these falsely."""
    rng = np.random.default_rng(0)
    proved = wrong = 0
    for _ in range(count):
        chain = made(rng)
        square = certificate.smallest(chain)
        if square is None or square < 2.0**-200:
            continue
        proved += 1
        wrong += not is_positive(chain.form(worst_weights(chain, square), square))
    return proved, wrong


RELU, STEEP, SIGNED = (0.5, 0.0), (1.25, 1.0), (0.25, -0.75)
CAMPAIGNS: dict[str, Callable[[np.random.Generator], Chain]] = {
    "rounding": lambda rng: near_singular(rng, [RELU, STEEP, SIGNED]),
    "products": cancelling,
    "errors of the first": lambda rng: with_errors(rng, 0, RELU),
    "errors of products": lambda rng: with_errors(rng, 2, (0.0, -1.0)),
    "errors of rows": lambda rng: with_errors(rng, 2, RELU),
    "errors of columns": lambda rng: with_errors(rng, 1, RELU),
}


@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_the_smallest_proofs_are_true(certificate: Certificate, campaign: str) -> None:
    proved, wrong = false_certificates(certificate, CAMPAIGNS[campaign], 25)
    assert proved >= 12
    assert wrong == 0


@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_every_term_is_needed(certificate: Certificate, campaign: str) -> None:
    certificate.leave_out(LEFT_OUT.index(campaign))
    _, wrong = false_certificates(certificate, CAMPAIGNS[campaign], 25)
    certificate.leave_out(None)
    assert wrong > 0


@pytest.mark.long
@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_the_smallest_proofs_of_many_are_true(certificate: Certificate, campaign: str) -> None:
    proved, wrong = false_certificates(certificate, CAMPAIGNS[campaign], 1500)
    assert proved >= 700
    assert wrong == 0


def test_numbers_out_of_range_are_refused(certificate: Certificate) -> None:
    """Ten squares that underflow, of a unit whose multiplier is denormal."""
    tiny = 2.0**-1074
    first = np.zeros((2, 11))
    first[0, 0], first[1, 1:] = 1, 0.7 * 2.0**-537
    chain = Chain(
        [first, np.array([[0.0, 1.0]])],
        [np.full(2, 0.5)],
        [np.zeros(2)],
        [np.array([2.0, 7 * tiny])],
    )
    assert certificate.smallest(chain) is None
    certificate.leave_out(LEFT_OUT.index("range"))
    proved = certificate.proves(chain, 5 * tiny)
    certificate.leave_out(None)
    assert proved
    assert not is_positive(chain.form([rational(weight) for weight in chain.weights], 5 * tiny))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-100, 1e100])
def test_hostile_multipliers(certificate: Certificate, number: float) -> None:
    rng = np.random.default_rng(1)
    for layer in range(2):
        chain = near_singular(rng, [RELU])
        chain.multipliers[layer][0] = number
        square = certificate.smallest(chain)
        assert square is None or is_positive(
            chain.form([rational(weight) for weight in chain.weights], square)
        )


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e16])
def test_hostile_weights_and_slopes(certificate: Certificate, number: float) -> None:
    for field in ("weights", "means", "products"):
        chain = near_singular(np.random.default_rng(2), [RELU])
        getattr(chain, field)[1].flat[0] = number
        square = certificate.smallest(chain)
        assert square is None or is_positive(
            chain.form([rational(weight) for weight in chain.weights], square)
        )
