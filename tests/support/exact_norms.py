"""Truth about spectral norms without any rounding: integer arithmetic, and known squares."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


def holds_exactly(matrix: Tensor, lower: float, upper: float) -> bool:
    """Whether lower <= ||W||_2 <= upper, decided in integers.

    With G = W W^T: t I - G is positive semidefinite exactly where t >= ||W||^2, and positive
    definite exactly where t > ||W||^2.
    """
    rows = [[Fraction(value) for value in row] for row in matrix.double().tolist()]
    if len(rows) > len(rows[0]):
        rows = [list(column) for column in zip(*rows, strict=True)]
    bounds = [Fraction(lower)] + ([] if upper == math.inf else [Fraction(upper)])
    denominator = math.lcm(*(x.denominator for row in [*rows, bounds] for x in row))
    whole = [[int(x * denominator) for x in row] for row in rows]
    gram = [[sum(a * b for a, b in zip(p, q, strict=True)) for q in whole] for p in whole]
    squares = [int(bound * denominator) ** 2 for bound in bounds]
    not_above = squares[0] == 0 or definiteness(shifted(squares[0], gram)) <= 0
    return not_above and all(definiteness(shifted(t, gram)) >= 0 for t in squares[1:])


def shifted(t: int, gram: list[list[int]]) -> list[list[int]]:
    return [
        [(t if i == j else 0) - value for j, value in enumerate(row)] for i, row in enumerate(gram)
    ]


def definiteness(matrix: list[list[int]]) -> int:
    """1 for a positive definite symmetric matrix, 0 for a semidefinite one, -1 for others.

    Bareiss' elimination without fractions: every entry is a minor, every division exact.
    """
    rest, previous, result = matrix, 1, 1
    while rest:
        pivot, head = rest[0][0], rest[0][1:]
        if pivot < 0 or (pivot == 0 and any(head)):
            return -1
        if pivot == 0:
            result, rest = 0, [row[1:] for row in rest[1:]]
            continue
        rest = [
            [(pivot * value - row[0] * top) // previous for value, top in zip(row[1:], head)]  # noqa: B905
            for row in rest[1:]
        ]
        previous = pivot
    return result


class Known(NamedTuple):
    """A matrix with the exact square of its spectral norm."""

    matrix: Tensor
    square: Fraction


def assert_known(known: Known, lower: float, upper: float) -> None:
    assert Fraction(lower) ** 2 <= known.square
    assert upper == math.inf or known.square <= Fraction(upper) ** 2


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 2 * torch.randint(0, 2, shape, generator=generator) - 1


def hadamard(n: int, generator: torch.Generator) -> Tensor:
    """+-1 entries, orthogonal rows of square n; n is a power of two. Rows shuffled, signs drawn."""
    matrix = torch.ones(1, 1, dtype=torch.int64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    order = torch.randperm(n, generator=generator)
    return matrix[order] * signs((n, 1), generator) * signs((1, n), generator)


def spectrum(name: str, n: int, generator: torch.Generator) -> Tensor:
    """Integers up to 2^24: the singular values of a matrix, up to its scale."""
    top = 1 << 24
    i = torch.arange(n, dtype=torch.float64)
    if name == "clustered":  # within 2^-24 of each other
        values = top - torch.randint(0, 3, (n,), generator=generator)
        return torch.where(i < n // 3, values, values // 2)
    if name == "dense at the top":
        return (top * (1 - (i / n) ** 2)).long()
    if name == "one large":
        return torch.where(i == 0, top, torch.randint(0, 2, (n,), generator=generator))
    if name == "graded":
        return (top * 0.5 ** (24 * i / n)).long()
    if name == "equal":
        return torch.full((n,), top)
    return torch.randint(0, top, (n,), generator=generator)


SPECTRA = ("clustered", "dense at the top", "one large", "graded", "equal", "uniform")


def with_spectrum(
    name: str, rows: int, cols: int, exponent: int, generator: torch.Generator
) -> Known:
    """2^exponent H_rows D H_cols for Hadamard matrices H: integers below 2^53, so nothing rounds.

    Rows and cols are powers of two; the norm is 2^exponent sqrt(rows cols) max D.
    """
    n = min(rows, cols)
    values = spectrum(name, n, generator)
    left = hadamard(rows, generator)[:, :n]
    right = hadamard(cols, generator)[:n]
    product = (left.double() * values) @ right.double()  # sums of integers below 2^53
    assert float(values.max()) * n < 2.0**53
    square = Fraction(rows * cols) * int(values.max()) ** 2 * Fraction(4) ** exponent
    return Known(product * 2.0**exponent, square)


def signed_permutation(values: Tensor, generator: torch.Generator) -> Known:
    """The given entries, one per row and column: their largest magnitude is the norm."""
    n = values.numel()
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[torch.arange(n), torch.randperm(n, generator=generator)] = values.double()
    return Known(matrix, Fraction(float(values.double().abs().max())) ** 2)


def circulant(n: int, generator: torch.Generator) -> Known:
    """Non-negative integers: rows and columns all have the same sum, which is the norm."""
    first = torch.randint(0, 1000, (n,), generator=generator)
    index = (torch.arange(n)[:, None] - torch.arange(n)) % n
    return Known(first[index].double(), Fraction(int(first.sum())) ** 2)


def rank_one(rows: int, cols: int, generator: torch.Generator) -> Known:
    a = torch.randint(-5000, 5000, (rows,), generator=generator)
    b = torch.randint(-5000, 5000, (cols,), generator=generator)
    square = int((a * a).sum()) * int((b * b).sum())
    return Known(torch.outer(a, b).double(), Fraction(square))


def row_or_column(n: int, row: bool, generator: torch.Generator) -> Known:
    vector = torch.randn(n, generator=generator, dtype=torch.float64)
    square = sum((Fraction(value) ** 2 for value in vector.tolist()), Fraction(0))
    return Known(vector[None] if row else vector[:, None], square)


def any_known(generator: torch.Generator, largest: int = 7) -> Known:
    """One of the above; sides of `with_spectrum` up to 2^largest."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def powers() -> tuple[int, int]:
        return 1 << integer(0, largest + 1), 1 << integer(0, largest + 1)

    def graded() -> Known:
        n = integer(1, 100)
        exponents = torch.empty(n, dtype=torch.float64).uniform_(-30, 30, generator=generator)
        return signed_permutation(10.0**exponents, generator)

    makers: tuple[Callable[[], Known], ...] = (
        *(
            lambda name=name: with_spectrum(name, *powers(), integer(-500, 400), generator)  # type: ignore[misc]
            for name in SPECTRA
        ),
        graded,
        lambda: signed_permutation(1 - torch.arange(97.0).double() ** 2 / 97**2, generator),
        lambda: circulant(integer(1, 100), generator),
        lambda: rank_one(integer(1, 100), integer(1, 100), generator),
        lambda: row_or_column(integer(1, 300), bool(integer(0, 2)), generator),
    )
    return makers[integer(0, len(makers))]()


def _gaussian(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, cols, generator=generator, dtype=torch.float64)


def _hilbert(rows: int, cols: int, _: torch.Generator) -> Tensor:
    i, j = torch.arange(rows)[:, None], torch.arange(cols)
    return 1 / (i + j + 1).double()


def _graded(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    exponents = torch.empty(rows, cols, dtype=torch.float64).uniform_(-30, 30, generator=generator)
    return 10.0**exponents * signs((rows, cols), generator)


def _rank_one_and_noise(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    noise = 10.0 ** -float(torch.randint(1, 17, (1,), generator=generator))
    column, row = _gaussian(rows, 1, generator), _gaussian(1, cols, generator)
    return column * row + noise * _gaussian(rows, cols, generator)


def _nearly_orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """All singular values within rounding of 1."""
    n = max(rows, cols)
    return torch.linalg.qr(_gaussian(n, n, generator))[0][:rows, :cols]


def _integers(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, (rows, cols), generator=generator).double()


def _denormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return _gaussian(rows, cols, generator) * 1e-320


def _edge_of_denormal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return _gaussian(rows, cols, generator) * 2.0**-1022


def _huge(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    return _gaussian(rows, cols, generator) * 1e306


def _sparse(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    keep = torch.rand(rows, cols, generator=generator) < 0.3
    return _gaussian(rows, cols, generator) * keep


FAMILIES: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": _gaussian,
    "hilbert": _hilbert,
    "graded": _graded,
    "rank one and noise": _rank_one_and_noise,
    "nearly orthogonal": _nearly_orthogonal,
    "integers": _integers,
    "denormal": _denormal,
    "edge of denormal": _edge_of_denormal,
    "huge": _huge,
    "sparse": _sparse,
}
