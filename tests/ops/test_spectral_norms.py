from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.reference.spectral_norms import spectral_norm_bracket

SHAPES = [
    (1, 1),
    (1, 7),
    (7, 1),
    (2, 2),
    (3, 5),
    (40, 64),
    (64, 10),
    (65, 65),
    (67, 200),
    (130, 66),
    (256, 256),
]
# What rounding alone costs the truth: LAPACK's svdvals in float64 is off by a few ulps of the norm.
SVD_ERROR = 1e-14


def exact_norm(matrix: Tensor, digits: int = 60) -> mpmath.mpf:
    """The largest singular value in `digits` digits."""
    with mpmath.workdps(digits):
        rows = [[mpmath.mpf(value) for value in row] for row in matrix.double().tolist()]
        return mpmath.svd_r(mpmath.matrix(rows), compute_uv=False)[0]


def assert_bracket(
    norms: lipfast.SpectralNorms, index: int, truth: float, gap: float = 1e-6
) -> None:
    lower, upper = float(norms.lower[index]), float(norms.upper[index])
    assert bool(norms.certified[index])
    assert lower <= truth * (1 + SVD_ERROR)
    assert upper >= truth * (1 - SVD_ERROR)
    assert upper - lower <= gap * upper


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_brackets_hold_the_svd(
    capability: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    matrices = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]
    norms = lipfast.spectral_norms(matrices)
    for index, matrix in enumerate(matrices):
        assert_bracket(norms, index, float(torch.linalg.svdvals(matrix.double())[0]))
        # Lower is attained by the vectors that come with it.
        image = matrix.double() @ norms.right[index]
        torch.testing.assert_close(norms.left[index] @ image, norms.lower[index], rtol=1e-6, atol=0)


def test_matches_the_reference(capability: str, generator: torch.Generator) -> None:
    for shape in SHAPES:
        matrix = torch.randn(shape, generator=generator)
        norms = lipfast.spectral_norms([matrix])
        lower, upper = spectral_norm_bracket(matrix)
        assert float(norms.lower[0]) <= upper and float(norms.upper[0]) >= lower
        assert math.isclose(float(norms.lower[0]), lower, rel_tol=1e-6)
        assert math.isclose(float(norms.upper[0]), upper, rel_tol=1e-6)


def special_matrices() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def orthogonal(n: int) -> Tensor:
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]

    def with_values(values: Tensor) -> Tensor:
        n = values.numel()
        return orthogonal(n) @ torch.diag(values) @ orthogonal(n)

    steps = torch.arange(100, dtype=torch.float64) / 100
    hilbert = 1 / (
        1
        + torch.arange(12.0, dtype=torch.float64)[:, None]
        + torch.arange(12.0, dtype=torch.float64)
    )
    noise = torch.randn(70, 90, generator=generator, dtype=torch.float64)
    graded = 10.0 ** torch.linspace(-30, 30, 66, dtype=torch.float64)
    return {
        "clustered": with_values(
            torch.cat([torch.ones(20) - 1e-9 * torch.arange(20), 0.5 * torch.ones(60)]).double()
        ),
        "dense at the top": with_values(1 - steps**2),
        "dense diagonal": torch.diag(1 - steps**2),
        "rank one and noise": torch.outer(torch.ones(70), torch.ones(90)).double() + 1e-9 * noise,
        "rank one": torch.outer(torch.arange(1.0, 71), torch.arange(1.0, 81)).double(),
        "hilbert": hilbert,
        "graded": graded[:, None] * torch.randn(66, 70, generator=generator, dtype=torch.float64),
        "orthogonal": orthogonal(80),
        "identity": torch.eye(97, dtype=torch.float64),
        "huge": noise * 1e300,
        "tiny": noise * 1e-300,
        "denormal": noise * 1e-312,
        "one entry": torch.tensor([[0.0, 0.0], [0.0, -1e-200]], dtype=torch.float64),
        "ones": torch.ones(3, 200, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", list(special_matrices()))
def test_special_matrices(capability: str, name: str) -> None:
    matrix = special_matrices()[name]
    norms = lipfast.spectral_norms([matrix])
    top = float(matrix.abs().max())
    truth = float(torch.linalg.svdvals(matrix / top)[0]) * top
    gap = 1e-6 if name != "denormal" else 1e-3  # the last bits of a denormal are coarse
    assert_bracket(norms, 0, truth, gap)


def test_never_below_in_exact_arithmetic(capability: str) -> None:
    """The truth in 60 digits, no tolerance: what an SVD in float64 cannot decide."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, 1), (1, 9), (9, 1), (2, 3), (5, 4), (8, 8)]
    matrices = [
        torch.randn(shape, generator=generator, dtype=dtype)
        for shape in shapes
        for dtype in (torch.float32, torch.float64)
    ]
    matrices += [
        torch.ones(6, 6),
        torch.eye(5) * 0.1,
        torch.full((3, 4), 1 / 3, dtype=torch.float64),
    ]
    norms = lipfast.spectral_norms(matrices, rtol=1e-12)
    for index, matrix in enumerate(matrices):
        truth = exact_norm(matrix)
        with mpmath.workdps(60):
            assert (
                mpmath.mpf(float(norms.lower[index]))
                <= truth
                <= mpmath.mpf(float(norms.upper[index]))
            )
        assert float(norms.upper[index] - norms.lower[index]) <= 1e-11 * float(norms.upper[index])


@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    data=st.data(),
)
def test_generated_matrices(rows: int, cols: int, data: st.DataObject) -> None:
    """Small integers times powers of two, against the singular value in 60 digits."""
    entry = st.builds(math.ldexp, st.integers(-7, 7), st.sampled_from([-40, -3, 0, 0, 5]))
    values = data.draw(st.lists(entry, min_size=rows * cols, max_size=rows * cols))
    matrix = torch.tensor(values, dtype=torch.float64).reshape(rows, cols)
    norms = lipfast.spectral_norms([matrix])
    truth = exact_norm(matrix)
    with mpmath.workdps(60):
        # mpmath's SVD is itself rounded: 50 of 60 digits are trusted.
        assert mpmath.mpf(float(norms.lower[0])) <= truth * (1 + mpmath.mpf(10) ** -50)
        assert mpmath.mpf(float(norms.upper[0])) >= truth * (1 - mpmath.mpf(10) ** -50)


def test_exact_rational_rows(capability: str) -> None:
    """One row: the square is a rational number, so that no second algorithm has to be trusted."""
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 3, 10, 100):
        for _ in range(20):
            row = torch.randn(1, size, generator=generator, dtype=torch.float64)
            square = sum(Fraction(value) ** 2 for value in row[0].tolist())
            for matrix in (row, row.T):
                norms = lipfast.spectral_norms([matrix], rtol=1e-10)
                assert (
                    Fraction(float(norms.lower[0])) ** 2
                    <= square
                    <= Fraction(float(norms.upper[0])) ** 2
                )


def test_zero_matrix(capability: str) -> None:
    norms = lipfast.spectral_norms([torch.zeros(3, 4), torch.zeros(100, 70)])
    assert norms.lower.tolist() == norms.upper.tolist() == [0.0, 0.0]
    assert norms.certified.all()
    assert [float(vector.norm()) for vector in norms.right + norms.left] == pytest.approx([1.0] * 4)


def test_flushed_denormals_do_not_reach_the_kernel(capability: str) -> None:
    matrix = torch.full((3, 3), 1e-310, dtype=torch.float64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        norms = lipfast.spectral_norms([matrix])
    finally:
        torch.set_flush_denormal(False)
    assert 2.9e-310 <= float(norms.lower[0]) <= 3e-310 <= float(norms.upper[0]) <= 3.1e-310


def test_start_vector_orthogonal_to_the_top(capability: str) -> None:
    for n in (3, 100):
        matrix = torch.diag(torch.arange(1.0, n + 1))
        start = torch.zeros(n)
        start[0] = 1.0  # an exact singular vector, of the smallest value
        for certify in (True, False):
            norms = lipfast.spectral_norms([matrix], start=[start], certify=certify)
            assert float(norms.lower[0]) == pytest.approx(n, rel=1e-6)


def test_warm_start_takes_fewer_passes(generator: torch.Generator) -> None:
    matrix = torch.randn(200, 150, generator=generator)
    cold = lipfast.spectral_norms([matrix], certify=False)
    warm = lipfast.spectral_norms([matrix], certify=False, start=[cold.right[0]])
    assert int(warm.passes[0]) < int(cold.passes[0])
    assert float(warm.lower[0]) == pytest.approx(float(cold.lower[0]), rel=1e-6)


def test_estimate_without_certificate(capability: str, generator: torch.Generator) -> None:
    matrices = [torch.randn(300, 200, generator=generator), torch.randn(5, 9, generator=generator)]
    norms = lipfast.spectral_norms(matrices, certify=False)
    assert norms.upper.tolist() == [math.inf, math.inf]
    assert not norms.certified.any()
    for index, matrix in enumerate(matrices):
        truth = float(torch.linalg.svdvals(matrix.double())[0])
        assert truth * (1 - 1e-6) <= float(norms.lower[index]) <= truth * (1 + SVD_ERROR)


def test_power_method(capability: str, generator: torch.Generator) -> None:
    matrix = torch.randn(100, 120, generator=generator)
    truth = float(torch.linalg.svdvals(matrix.double())[0])
    norms = lipfast.spectral_norms([matrix], method="power", max_passes=100, certify=False)
    assert int(norms.passes[0]) == 100
    assert 0.9 * truth < float(norms.lower[0]) < truth
    certified = lipfast.spectral_norms([matrix], method="power", max_passes=3)
    assert float(certified.lower[0]) <= truth <= float(certified.upper[0])


def test_memory_budget_falls_back_to_a_loose_proved_bound(
    capability: str, generator: torch.Generator
) -> None:
    matrix = torch.randn(100, 120, generator=generator)
    norms = lipfast.spectral_norms([matrix], memory=1000)
    truth = float(torch.linalg.svdvals(matrix.double())[0])
    assert norms.method == ["holder"]
    assert bool(norms.certified[0])
    assert truth <= float(norms.upper[0]) <= 10 * truth
    assert float(norms.lower[0]) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype, generator: torch.Generator) -> None:
    base = torch.randn(30, 80, generator=generator).to(dtype)
    views = [base, base.T, base[::2, ::3], base[5:6], base[:, 7:8]]
    norms = lipfast.spectral_norms(views)
    for index, view in enumerate(views):
        assert_bracket(norms, index, float(torch.linalg.svdvals(view.double())[0]))


def test_one_norm_and_inf_norm(generator: torch.Generator) -> None:
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for norm in (1, math.inf):
        norms = lipfast.spectral_norms(matrices, norm=norm)
        for index, matrix in enumerate(matrices):
            sums = [
                sum(map(Fraction, row))
                for row in (matrix.T if norm == 1 else matrix).abs().tolist()
            ]
            assert (
                Fraction(float(norms.lower[index]))
                <= max(sums)
                <= Fraction(float(norms.upper[index]))
            )
            assert float(norms.upper[index]) <= float(max(sums)) * (1 + 1e-12)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_sums_that_overflow_have_a_finite_lower_bound(norm: float) -> None:
    matrix = torch.full((5, 5), 1.1e308, dtype=torch.float64)
    norms = lipfast.spectral_norms([matrix], norm=norm)
    assert 1.7e308 < float(norms.lower[0]) < math.inf
    assert float(norms.upper[0]) == math.inf


def test_results_do_not_depend_on_threads_or_company(
    capability: str, generator: torch.Generator
) -> None:
    matrices = [torch.randn(shape, generator=generator) for shape in SHAPES * 3]
    threads = torch.get_num_threads()
    together = lipfast.spectral_norms(matrices)
    try:
        torch.set_num_threads(1)
        alone = [lipfast.spectral_norms([matrix]) for matrix in matrices]
    finally:
        torch.set_num_threads(threads)
    assert together.lower.tolist() == [float(norms.lower[0]) for norms in alone]
    assert together.upper.tolist() == [float(norms.upper[0]) for norms in alone]


def test_inputs_keep_their_keys(generator: torch.Generator) -> None:
    named = {
        "a": torch.randn(3, 4, generator=generator),
        "b.weight": torch.randn(5, 2, generator=generator),
    }
    norms = lipfast.spectral_norms(named)
    assert list(norms.lower) == list(norms.upper) == list(norms.right) == ["a", "b.weight"]
    assert norms.right["b.weight"].shape == (2,)
    assert "b.weight" in repr(norms)
    batch = lipfast.spectral_norms(torch.stack([torch.eye(3), 2 * torch.eye(3)]))
    assert batch.lower.tolist() == pytest.approx([1.0, 2.0])


def test_state_dict_gives_its_matrices(generator: torch.Generator) -> None:
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    )
    state_dict = model.state_dict()
    norms = lipfast.spectral_norms(state_dict)
    assert list(norms.lower) == list(norms.right) == ["0.weight", "3.weight"]
    alone = lipfast.spectral_norms([state_dict["0.weight"], state_dict["3.weight"]])
    assert [float(value) for value in norms.upper.values()] == alone.upper.tolist()
    again = lipfast.spectral_norms(state_dict, start=norms.right, certify=False)
    assert float(again.lower["3.weight"]) == pytest.approx(float(norms.lower["3.weight"]), rel=1e-6)
    column_sums = lipfast.spectral_norms(state_dict, norm=1)
    assert list(column_sums.upper) == ["0.weight", "3.weight"]


def test_start_of_one_matrix_and_of_a_batch(generator: torch.Generator) -> None:
    batch = torch.randn(3, 40, 20, generator=generator)
    cold = lipfast.spectral_norms(batch)
    warm = lipfast.spectral_norms(batch, start=torch.stack(cold.right))
    single = lipfast.spectral_norms(batch[0], start=cold.right[0])
    assert bool((warm.passes < cold.passes).all())
    assert single.lower.tolist() == warm.lower.tolist()[:1]


def scalar(norms: lipfast.SpectralNorms, side: str) -> Tensor:
    values = getattr(norms, side)
    return (torch.stack(list(values.values())) if isinstance(values, dict) else values).sum()


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("side", ["lower", "upper"])
def test_gradcheck(side: str, norm: float, generator: torch.Generator) -> None:
    """Gaussian matrices: the largest singular value is simple."""
    matrices = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 1), (3, 5), (5, 2), (70, 66))
    ]

    def function(*values: Tensor) -> Tensor:
        result: Tensor = getattr(lipfast.spectral_norms(list(values), norm=norm, rtol=1e-12), side)
        return result

    assert torch.autograd.gradcheck(function, matrices[:3])
    assert torch.autograd.gradcheck(function, matrices, fast_mode=True)


@pytest.mark.parametrize("keyed", [False, True])
def test_gradient_is_the_outer_product(keyed: bool, generator: torch.Generator) -> None:
    matrix = torch.randn(30, 20, generator=generator, requires_grad=True)
    fixed = torch.randn(4, 4, generator=generator)
    tensors = {"a": matrix, "b": fixed} if keyed else [matrix, fixed]
    norms = lipfast.spectral_norms(tensors)
    scalar(norms, "lower").backward()
    key = "a" if keyed else 0
    expected = torch.outer(norms.left[key], norms.right[key]).float()
    torch.testing.assert_close(matrix.grad, expected)
    u, _, vh = torch.linalg.svd(matrix.detach().double())
    torch.testing.assert_close(expected.double(), torch.outer(u[:, 0], vh[0]), atol=1e-3, rtol=0)
    assert not norms.right[key].requires_grad
    assert fixed.grad is None
    assert "certified" in repr(norms)  # without the warning of a conversion that loses gradients


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradient_has_the_dtype_of_the_matrix(
    norm: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    leaf = torch.randn(6, 4, generator=generator).to(dtype).requires_grad_()
    scalar(lipfast.spectral_norms([leaf.T], norm=norm), "upper").backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    # The norm is homogeneous: <gradient, W> = norm (Euler).
    value = float(lipfast.spectral_norms([leaf.detach().T], norm=norm).upper[0])
    product = float((leaf.grad.double() * leaf.detach().double()).sum())
    assert product == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize("norm", [1, 2, math.inf])
@pytest.mark.parametrize("shape", [(3, 4), (100, 70)])
def test_gradient_at_zero_is_zero(norm: float, shape: tuple[int, int]) -> None:
    matrix = torch.zeros(shape, requires_grad=True)
    norms = lipfast.spectral_norms([matrix], norm=norm)
    (norms.lower + norms.upper).sum().backward()
    assert matrix.grad is not None
    assert not matrix.grad.any()


def test_gradient_only_where_it_is_asked_for() -> None:
    matrix = torch.eye(3, requires_grad=True)
    with torch.no_grad():
        assert not lipfast.spectral_norms([matrix]).lower.requires_grad
    assert not lipfast.spectral_norms([matrix.detach()]).lower.requires_grad
    estimate = lipfast.spectral_norms([matrix], certify=False)
    assert estimate.lower.requires_grad
    assert not estimate.upper.requires_grad  # infinite, whatever the matrix


def test_second_derivative_is_an_error(generator: torch.Generator) -> None:
    matrix = torch.randn(3, 4, generator=generator, requires_grad=True)
    value = lipfast.spectral_norms([matrix]).lower.square().sum()
    (gradient,) = torch.autograd.grad(value, matrix, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


KERNEL = torch.ones(8, 4, 3, 3)
BAD = {
    "convolution": ({"a": torch.eye(2), "conv.weight": KERNEL}, ArgumentError, "conv.weight.*conv"),
    "1-D convolution": ({"conv.weight": torch.ones(8, 4, 3)}, ArgumentError, "conv.weight.*conv"),
    "convolution in a list": ([KERNEL], ArgumentError, "matrix 0.*2 dimensions"),
    "batch in a list": ([torch.ones(2, 3, 3)], ArgumentError, "matrix 0.*2 dimensions"),
    "no matrix in a dict": ({"bias": torch.ones(3)}, ArgumentError, "no matrices among"),
    "empty dict": ({}, ArgumentError, "no matrices"),
    "module": (torch.nn.Linear(2, 2), ArgumentError, "state_dict"),
    "integer in a dict": ({"w": torch.ones(2, 2).int()}, ArgumentError, "'w'.*int32"),
    "complex in a dict": ({"w": torch.ones(2, 2) * 1j}, ArgumentError, "'w'.*complex64"),
    "sparse in a dict": ({"w": torch.eye(3).to_sparse()}, ArgumentError, "'w'.*to_dense"),
    "not a tensor in a dict": ({"w": torch.eye(3), "extra": 3}, ArgumentError, "'extra'.*int"),
    "nan": ([torch.eye(2), torch.tensor([[1.0, math.nan]])], NonFiniteError, "matrix 1"),
    "inf": ([torch.tensor([[math.inf, 0.0]])], NonFiniteError, "matrix 0"),
    "inf in a large one": ({"w": torch.full((100, 100), -math.inf)}, NonFiniteError, "'w'"),
    "empty": ([torch.eye(2), torch.zeros(0, 3)], ArgumentError, "matrix 1.*empty"),
    "integer": ([torch.ones(2, 2, dtype=torch.int64)], ArgumentError, "int64"),
    "complex": ([torch.ones(2, 2, dtype=torch.complex64)], ArgumentError, "complex64"),
    "sparse": ([torch.eye(3).to_sparse()], ArgumentError, "to_dense"),
    "vector": ([torch.ones(3)], ArgumentError, "2 dimensions"),
    "meta": ([torch.ones(3, 3, device="meta")], ArgumentError, "holds no data"),
    "no matrices": ([], ArgumentError, "no matrices"),
    "a number": (3.0, ArgumentError, "list or a dict"),
    "not a tensor": ([[1.0]], ArgumentError, "torch.Tensor"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input(case: str) -> None:
    tensors, error, message = BAD[case]
    with pytest.raises(error, match=message):
        lipfast.spectral_norms(tensors)


def test_sides_beyond_what_is_proved() -> None:
    matrices = [torch.eye(2), torch.empty(0, 2**30)]
    with pytest.raises(RuntimeError, match=r"matrix 1: is 0 x 1073741824; .* sides below 2\^30"):
        torch.ops.lipfast.spectral_norms(matrices, [], False, 1e-6, 1, False, 0, 1)


@pytest.mark.parametrize("norm", [1, math.inf])
def test_bad_input_other_norms(norm: float) -> None:
    with pytest.raises(NonFiniteError, match="matrix 1"):
        lipfast.spectral_norms([torch.eye(2), torch.tensor([[1.0, math.nan]])], norm=norm)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": 3},
        {"rtol": 0.0},
        {"method": "svd"},
        {"max_passes": 0},
        {"max_passes": 3.5},
        {"rtol": "x"},
        {"seed": "a"},
        {"seed": -1},
        {"memory": None},
        {"start": []},
        {"start": [torch.ones(3)]},
        {"start": {0: torch.ones(2)}},
        {"start": [torch.ones(2).int()]},
        {"start": [[1.0, 1.0]]},
        {"start": [torch.tensor([1.0, math.nan])]},
        {"start": torch.tensor(1.0)},
        {"start": "1"},
    ],
)
def test_bad_options(options: dict[str, object]) -> None:
    with pytest.raises(ArgumentError if "nan" not in str(options) else NonFiniteError):
        lipfast.spectral_norms([torch.eye(2)], **options)


def test_bad_start_of_a_mapping() -> None:
    matrices = {"w": torch.eye(2), "bias": torch.ones(2)}
    with pytest.raises(ArgumentError, match="expected a mapping"):
        lipfast.spectral_norms(matrices, start=[torch.ones(2)])
    with pytest.raises(ArgumentError, match="no matrix 'v'"):
        lipfast.spectral_norms(matrices, start={"v": torch.ones(2)})
    with pytest.raises(ArgumentError, match=r"'w'.*expected 2 values"):
        lipfast.spectral_norms(matrices, start={"w": torch.ones(3)})


def test_opcheck(generator: torch.Generator) -> None:
    matrices = [torch.randn(4, 7, generator=generator), torch.randn(9, 2, generator=generator)]
    start = [
        torch.randn(7, generator=generator, dtype=torch.float64),
        torch.empty(0, dtype=torch.float64),
    ]
    for starts in ([], start):
        arguments = (matrices, starts, True, 1e-6, 100, False, 0, 1 << 20)
        torch.library.opcheck(torch.ops.lipfast.spectral_norms.default, arguments)
        leaves = [matrices[0].clone().requires_grad_(), matrices[1]]
        torch.library.opcheck(torch.ops.lipfast.spectral_norms.default, (leaves, *arguments[1:]))


def test_native_checks_of_its_own() -> None:
    """The op is public in torch.ops: it checks too, and says which entry."""
    with pytest.raises(RuntimeError, match="matrix 1"):
        torch.ops.lipfast.spectral_norms(
            [torch.eye(2), torch.ones(3)], [], True, 1e-6, 100, False, 0, 1 << 20
        )


@pytest.mark.long
def test_never_below_campaign(capability: str) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(40):
        rows, cols = torch.randint(1, 90, (2,), generator=generator).tolist()
        scale = 10.0 ** torch.randint(-12, 12, (150, rows, 1), generator=generator).double()
        rank = torch.randn(150, rows, cols, generator=generator, dtype=torch.float64)
        matrices = rank * scale if torch.rand(1, generator=generator) < 0.5 else rank
        norms = lipfast.spectral_norms(matrices)
        truth = torch.linalg.svdvals(matrices)[:, 0]
        assert bool((norms.lower <= truth * (1 + SVD_ERROR)).all())
        assert bool((norms.upper >= truth * (1 - SVD_ERROR)).all())
        assert bool((norms.upper - norms.lower <= 1e-6 * norms.upper).all())


# Shape, and whether to certify: all threads on the Gram matrix, on W, and blocks of vectors.
LARGE = {
    "gram": ((1200, 900), True),
    "wide gram": ((800, 1400), True),
    "one pass": ((1100, 1000), False),
    "blocks": ((2100, 2000), False),
    "blocks of a wide matrix of small rank": ((70, 60000), False),
    "blocks of a tall matrix": ((60000, 70), False),
    "half the threads' memory": ((1100, 1000), True),
}


@pytest.mark.parametrize("case", list(LARGE))
def test_large_matrices_share_the_threads(case: str, generator: torch.Generator) -> None:
    shape, certify = LARGE[case]
    memory = 1000 if case.startswith("half") else 2 << 30
    matrix = torch.randn(shape, generator=generator)
    norms = lipfast.spectral_norms([matrix], certify=certify, memory=memory)
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    gram = wide @ wide.T
    truth = float(torch.linalg.eigvalsh(gram)[-1]) ** 0.5
    assert truth * (1 - 1e-6) <= float(norms.lower[0]) <= truth * (1 + 1e-12)
    if certify:
        assert float(norms.upper[0]) >= truth * (1 - 1e-12)
        if memory > 1000:
            assert float(norms.upper[0]) <= truth * (1 + 1e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = lipfast.spectral_norms([matrix], certify=certify, memory=memory)
    finally:
        torch.set_num_threads(threads)
    assert alone.lower.tolist() == norms.lower.tolist()
    assert alone.upper.tolist() == norms.upper.tolist()
    assert torch.equal(alone.right[0], norms.right[0])


def test_huge_entries_in_a_large_matrix(capability: str, generator: torch.Generator) -> None:
    """The one-pass operator scales by powers of two: neither 1e37 nor 1e-37 leaves float32."""
    matrix = torch.randn(90, 80, generator=generator)
    for scale in (1e37, 1e-37, 1e-42):
        scaled = matrix * scale
        reference = float(torch.linalg.svdvals(scaled.double() / scale)[0])
        norms = lipfast.spectral_norms([scaled], certify=False)
        assert float(norms.lower[0]) / scale == pytest.approx(reference, rel=1e-5)
