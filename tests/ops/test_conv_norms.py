from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.ops._conv_operator import conv_operator
from lipfast.reference.conv_norms import conv_matrix, polyphase, symbol_maximum
from tests.support.conv_cases import OPTIONS, Case, draw, together

# What rounding alone costs the truth: LAPACK's svdvals in float64, and sums of taps in the matrix.
SVD_ERROR = 1e-13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny convolutions wait for threads longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def truth(case: Case) -> float:
    return float(torch.linalg.svdvals(case.matrix)[0])


def image(case: Case, vector: Tensor) -> Tensor:
    return case.matrix @ vector.flatten()


def test_generated_convolutions_hold_the_svd() -> None:
    """400 of every kind in one call: lower <= truth <= upper, and lower is attained."""
    generator = torch.Generator().manual_seed(11)
    cases = [draw(generator) for _ in range(400)]
    norms = lipfast.conv_norms([case.kernel for case in cases], **together(cases))
    assert bool(norms.certified.all())
    for i, case in enumerate(cases):
        value, lower, upper = truth(case), float(norms.lower[i]), float(norms.upper[i])
        assert lower <= value * (1 + SVD_ERROR), case.options
        assert upper >= value * (1 - SVD_ERROR), case.options
        assert lower >= value * (1 - 1e-3), case.options
        attained = torch.dot(norms.left[i].flatten(), image(case, norms.right[i]))
        torch.testing.assert_close(float(attained), lower, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("stride", [1, 2])
def test_modules_of_every_mode(mode: str, stride: int, capability: str) -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = torch.randn(4, 3, 3, 3, generator=generator)
    matrix = conv_matrix(
        kernel,
        (6, 5),
        stride=(stride, stride),
        padding=[(1, 1), (1, 1)],
        dilation=(1, 1),
        padding_mode=mode,
    )
    norms = lipfast.conv_norms(
        kernel, input_sizes=(6, 5), stride=stride, padding=1, padding_mode=mode
    )
    value = float(torch.linalg.svdvals(matrix)[0])
    assert value * (1 - 1e-3) <= float(norms.lower[0]) <= value * (1 + SVD_ERROR)
    assert value * (1 - SVD_ERROR) <= float(norms.upper[0]) <= 3.5 * value


def supremum(norms: Any, index: int = 0) -> tuple[float, float]:
    return float(norms.supremum.lower[index]), float(norms.supremum.upper[index])


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 2), (3, 2, 5), (2, 3, 3, 3), (5, 4, 2, 4), (2, 2, 2, 3, 2), (30, 40, 3, 3)],
    ids=str,
)
@pytest.mark.parametrize("family", ["gaussian", "low-pass"])
def test_supremum_brackets_a_grid(shape: tuple[int, ...], family: str, capability: str) -> None:
    kernel = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    kernel = kernel.abs() if family == "low-pass" else kernel
    axes = len(shape) - 2
    norms = lipfast.conv_norms(kernel, input_sizes=(4,) * axes, padding=2)
    lower, upper = supremum(norms)
    assert upper - lower <= 1e-3 * upper
    taps = polyphase(kernel, (1,) * axes, (1,) * axes)
    points = {1: 200, 2: 16, 3: 6}[axes]
    assert upper >= symbol_maximum(taps, points) * (1 - SVD_ERROR)
    if family == "low-pass":  # a symbol with positive taps is largest at zero
        top = float(torch.linalg.svdvals(taps.double().flatten(0, axes - 1).sum(0))[0])
        assert lower <= top * (1 + SVD_ERROR) and upper >= top * (1 - SVD_ERROR)


def test_large_matrices_take_the_blocked_factorisation(capability: str) -> None:
    """Sides over and across blocks and panels; the truth by a grid of frequencies and one input."""
    generator = torch.Generator().manual_seed(6)
    for out, inputs, size in ((73, 80, (3,)), (130, 129, (2,)), (129, 200, (2, 2))):
        kernel = torch.randn(out, inputs, *size, generator=generator)
        axes = len(size)
        norms = lipfast.conv_norms(kernel, input_sizes=(5,) * axes, rtol=3e-3)
        lower, upper = supremum(norms)
        taps = polyphase(kernel, (1,) * axes, (1,) * axes)
        assert upper >= symbol_maximum(taps, 8 if axes == 2 else 32) * (1 - SVD_ERROR)
        assert upper - lower <= 3e-3 * upper
        assert float(norms.lower[0]) <= upper


def orthogonal_taps(n: int, generator: torch.Generator) -> Tensor:
    """A kernel whose symbol is unitary everywhere: projections shifted against each other."""
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    half = q[:, : n // 2] @ q[:, : n // 2].T
    return torch.stack([half, torch.eye(n, dtype=torch.float64) - half], dim=-1)


def test_flat_symbols_need_few_cells(capability: str) -> None:
    generator = torch.Generator().manual_seed(7)
    dirac = torch.nn.init.dirac_(torch.empty(64, 64, 3, 3))
    noisy = dirac + 0.002 * torch.randn(dirac.shape, generator=generator)
    unitary = orthogonal_taps(20, generator)
    norms = lipfast.conv_norms([dirac, unitary], input_sizes=[(4, 4), (4,)], padding=1)
    for index in range(2):
        lower, upper = supremum(norms, index)
        assert lower <= 1.0 + 1e-12 and upper >= 1.0 - 1e-12
        assert upper - lower <= 1e-3 * upper
        assert int(norms.cells[index]) < 400
    near = lipfast.conv_norms(noisy, input_sizes=(4, 4), padding=1)
    assert int(near.cells[0]) < 3000
    assert supremum(near)[1] - supremum(near)[0] <= 1e-3 * supremum(near)[1]


def test_groups_are_their_maximum(capability: str) -> None:
    generator = torch.Generator().manual_seed(8)
    kernel = torch.randn(40, 1, 5, 5, generator=generator)
    depthwise = lipfast.conv_norms(kernel, input_sizes=(9, 9), padding=2, groups=40)
    alone = lipfast.conv_norms(list(kernel.split(1)), input_sizes=(9, 9), padding=2)
    upper = float(alone.supremum.upper.max())
    assert float(depthwise.supremum.upper[0]) == pytest.approx(upper, rel=2e-3)
    assert float(depthwise.supremum.upper[0]) >= float(alone.supremum.lower.max())
    assert float(depthwise.lower[0]) == pytest.approx(float(alone.lower.max()), rel=2e-3)


def test_circulants_on_small_grids_are_exact() -> None:
    kernel = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(9))
    options = {"input_sizes": (4, 5), "padding": 1, "padding_mode": "circular"}
    norms = lipfast.conv_norms(kernel, **options)
    assert float(norms.upper[0]) <= float(norms.lower[0]) * (1 + 1.5e-3)
    assert float(norms.upper[0]) < float(norms.supremum.lower[0])


def test_one_tap_is_a_matrix() -> None:
    kernel = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(10))
    norms = lipfast.conv_norms(kernel, input_sizes=(3, 3))
    exact = lipfast.spectral_norms([kernel[:, :, 0, 0]])
    assert norms.method == ["matrix"]
    assert float(norms.upper[0]) >= float(exact.lower[0])
    assert float(norms.lower[0]) == pytest.approx(float(exact.lower[0]), rel=1e-3)


def test_zero_tiny_and_huge_kernels(capability: str) -> None:
    base = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    kernels = [base * scale for scale in (0.0, 1e-320, 1e-300, 1e300)]
    norms = lipfast.conv_norms(kernels, input_sizes=7, padding=1)
    reference = lipfast.conv_norms(base, input_sizes=7, padding=1)
    assert float(norms.lower[0]) == float(norms.upper[0]) == 0.0
    for index, scale in ((2, 1e-300), (3, 1e300)):
        assert float(norms.lower[index]) == pytest.approx(float(reference.lower[0]) * scale)
        assert float(norms.upper[index]) == pytest.approx(float(reference.upper[0]) * scale)
    assert 0 < float(norms.lower[1]) <= float(norms.upper[1]) < 1e-318


def test_budget_and_memory_leave_a_proved_bound() -> None:
    kernel = torch.randn(12, 16, 3, 3, generator=torch.Generator().manual_seed(13))
    full = lipfast.conv_norms(kernel, input_sizes=(6, 6), padding=1)
    small = lipfast.conv_norms(kernel, input_sizes=(6, 6), padding=1, max_cells=5)
    none = lipfast.conv_norms(kernel, input_sizes=(6, 6), padding=1, memory=1000)
    assert small.method == ["cholesky"] and none.method == ["holder"]
    assert int(small.cells[0]) < int(full.cells[0])
    lower = float(full.supremum.lower[0])
    assert lower <= float(small.upper[0]) <= 1.6 * lower
    assert lower <= float(none.upper[0]) <= 10 * lower
    assert float(none.lower[0]) == pytest.approx(float(full.lower[0]), rel=1e-3)


def test_vectors_belong_together_whatever_the_memory() -> None:
    """The image of the right vector is made row by row where there is little."""
    kernel = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0)).double()
    for memory in (1 << 30, 6_000, 0):
        norms = lipfast.conv_norms([kernel], input_sizes=(6, 5), padding=1, memory=memory)
        image = torch.nn.functional.conv2d(norms.right[0][None], kernel, padding=1)[0]
        torch.testing.assert_close(norms.left[0], image / image.norm())


def test_warm_start_begins_at_the_maximum() -> None:
    generator = torch.Generator().manual_seed(14)
    kernel = torch.randn(16, 16, 3, 3, generator=generator)
    cold = lipfast.conv_norms({"a": kernel}, input_sizes=(12, 12), padding=1)
    after = kernel + 1e-3 * torch.randn(kernel.shape, generator=generator)
    warm = lipfast.conv_norms({"a": after}, input_sizes=(12, 12), padding=1, start=cold)
    again = lipfast.conv_norms({"a": after}, input_sizes=(12, 12), padding=1)
    assert float(warm.lower["a"]) == pytest.approx(float(again.lower["a"]), rel=1e-3)
    assert float(warm.upper["a"]) == pytest.approx(float(again.upper["a"]), rel=2e-3)
    assert int(warm.passes["a"]) <= int(again.passes["a"])
    up = lipfast.conv_norms(kernel, input_sizes=(5, 5), transposed=True, stride=2)
    warm_up = lipfast.conv_norms(kernel, input_sizes=(5, 5), transposed=True, stride=2, start=up)
    assert float(warm_up.lower[0]) == pytest.approx(float(up.lower[0]), rel=1e-3)


def test_a_kernel_nearby_is_bounded_by_the_difference() -> None:
    generator = torch.Generator().manual_seed(18)
    kernel = torch.randn(20, 16, 3, 3, generator=generator)
    options: dict[str, Any] = {"input_sizes": (8, 8), "padding": 1, "rtol": 1e-2}
    first = norms = lipfast.conv_norms(kernel, **options)
    methods = []
    for _ in range(6):
        kernel = kernel + 1e-3 * torch.randn(kernel.shape, generator=generator)
        norms = lipfast.conv_norms(kernel, **options, start=norms)
        cold = lipfast.conv_norms(kernel, **{**options, "rtol": 1e-4})
        lower, upper = supremum(norms)
        assert lower <= supremum(cold)[1] and upper >= supremum(cold)[0]
        assert upper - lower <= 1e-2 * upper
        methods += norms.method
    assert methods[0] == "difference" and methods.count("difference") >= 3
    assert int(norms.cells[0]) < int(first.cells[0]) or norms.method == ["cholesky"]
    same = lipfast.conv_norms(kernel, **options, start=norms)
    far = lipfast.conv_norms(2 * kernel, **options, start=norms)
    assert same.method == norms.method and far.method == ["cholesky"]
    assert float(far.upper[0]) >= 2 * supremum(norms)[0]


def test_generated_options_from_kernels_nearby() -> None:
    """Two hundred generated convolutions, started from others like them, against the SVD."""
    generator = torch.Generator().manual_seed(21)
    cases = [draw(generator) for _ in range(200)]
    options = {**together(cases), "rtol": 1e-2}
    before = [
        case.kernel * (1 + 3e-4 * torch.randn(case.kernel.shape, generator=generator))
        for case in cases
    ]
    start = lipfast.conv_norms(before, **options)
    norms = lipfast.conv_norms([case.kernel for case in cases], **options, start=start)
    for i, case in enumerate(cases):
        value = truth(case)
        assert float(norms.lower[i]) <= value * (1 + SVD_ERROR), case.options
        assert float(norms.upper[i]) >= value * (1 - SVD_ERROR), case.options
        lower, upper = supremum(norms, i)
        assert upper - lower <= 1e-2 * upper, case.options
    several = [method for method in norms.method if method != "matrix"]
    assert several.count("difference") >= 0.9 * len(several)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_difference_of_low_rank_or_few_taps(groups: int, capability: str) -> None:
    """Where the matrix of the taps says too much, few cells say enough."""
    generator = torch.Generator().manual_seed(19)
    kernel = torch.randn(12, 12 // groups, 3, 3, generator=generator)
    options: dict[str, Any] = {"input_sizes": (6, 6), "padding": 1, "rtol": 1e-2, "groups": groups}
    first = lipfast.conv_norms(kernel, **options)
    for size in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2):
        change = torch.randn(12, 1, 1, 1, generator=generator).expand_as(kernel)
        after = kernel + size * change
        norms = lipfast.conv_norms(after, **options, start=first)
        matrix = conv_matrix(
            after,
            (6, 6),
            stride=(1, 1),
            padding=[(1, 1), (1, 1)],
            dilation=(1, 1),
            groups=groups,
        )
        value = float(torch.linalg.svdvals(matrix)[0])
        assert float(norms.lower[0]) <= value * (1 + SVD_ERROR)
        assert float(norms.upper[0]) >= value * (1 - SVD_ERROR)
        lower, upper = supremum(norms)
        assert 0 <= upper - lower <= 1e-2 * upper
        taps = polyphase(after, (1, 1), (1, 1)) if groups == 1 else None
        assert taps is None or upper >= symbol_maximum(taps, 16) * (1 - SVD_ERROR)
        assert norms.method[0] == "difference" or size > 1e-4


def test_a_bound_that_overflowed_is_no_reference() -> None:
    huge = torch.full((1, 1, 3), 1.5e308, dtype=torch.float64)
    before = lipfast.conv_norms(huge, input_sizes=5, padding=1)
    assert float(before.upper[0]) == math.inf
    after = lipfast.conv_norms(huge * 2.0**-1000, input_sizes=5, padding=1, start=before)
    assert float(after.upper[0]) < 1e9 and after.method == ["cholesky"]
    nothing = lipfast.conv_norms(0 * huge, input_sizes=5, padding=1)
    again = lipfast.conv_norms(0 * huge, input_sizes=5, padding=1, start=nothing)
    assert float(again.upper[0]) == 0.0


def test_the_shape_of_the_taps_is_known_beforehand() -> None:
    generator = torch.Generator().manual_seed(20)
    for _ in range(200):
        case = draw(generator)
        options = {**OPTIONS, **case.options}
        conv = conv_operator(
            case.kernel, "kernel", input_size=options.pop("input_sizes"), **options
        )
        assert conv.taps_shape() == tuple(conv.taps().shape)


def test_a_start_survives_changes_in_place() -> None:
    kernel = torch.tensor([0.25, 0.5, 0.25]).reshape(1, 1, 3)
    before = lipfast.conv_norms(kernel, input_sizes=9, padding=1)
    kernel.mul_(2.0)
    after = lipfast.conv_norms(kernel, input_sizes=9, padding=1, start=before)
    assert float(after.supremum.upper[0]) >= 2.0


def test_results_do_not_depend_on_threads() -> None:
    generator = torch.Generator().manual_seed(15)
    kernels = [torch.randn(n, n, 3, 3, generator=generator) for n in (2, 60, 90)]
    alone = lipfast.conv_norms(kernels, input_sizes=(4, 4), rtol=5e-3)
    torch.set_num_threads(2)
    together_ = lipfast.conv_norms(kernels, input_sizes=(4, 4), rtol=5e-3)
    assert alone.supremum.lower.tolist() == together_.supremum.lower.tolist()
    assert alone.supremum.upper.tolist() == together_.supremum.upper.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype) -> None:
    base = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(16)).to(dtype)
    views = [base, base.transpose(0, 1), base.to(memory_format=torch.channels_last), base[::2]]
    norms = lipfast.conv_norms(views, input_sizes=(4, 4), padding=1)
    for index, view in enumerate(views):
        matrix = conv_matrix(view, (4, 4), stride=(1, 1), padding=[(1, 1), (1, 1)], dilation=(1, 1))
        value = float(torch.linalg.svdvals(matrix)[0])
        assert float(norms.lower[index]) <= value * (1 + SVD_ERROR)
        assert float(norms.upper[index]) >= value * (1 - SVD_ERROR)


def test_a_state_dict_gives_its_kernels() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3, stride=2)
    )
    sizes = {"0.weight": (8, 8), "2.weight": (6, 6)}
    norms = lipfast.conv_norms(
        model.state_dict(), input_sizes=sizes, stride={"0.weight": 1, "2.weight": 2}
    )
    assert list(norms.upper) == list(norms.supremum.lower) == ["0.weight", "2.weight"]
    assert norms.right["2.weight"].shape == (4, 6, 6)
    assert norms.left["2.weight"].shape == (2, 2, 2)
    assert norms.frequency["0.weight"].shape == (2,)
    assert "2.weight" in repr(norms)


def test_opcheck() -> None:
    taps = torch.randn(2, 3, 2, 1, 3, 4, generator=torch.Generator().manual_seed(17))
    empty = torch.empty(0, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.lipfast.conv_norms.default, ([taps], [empty], [0, 0, 0], 1e-2, 1000, 0, 1 << 28)
    )


KERNEL = torch.ones(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_sizes": (4, 4, 4)}, "input_sizes: expected 2 values"),
        ({"input_sizes": (4, 0)}, "input_sizes: expected values of 1"),
        ({"input_sizes": (4.0, 4)}, "input_sizes: expected an integer"),
        ({"input_sizes": (2, 2)}, "the output would be empty"),
        ({"stride": 0}, "stride: expected values of 1"),
        ({"stride": [1, 1]}, "stride: a list holds one value per kernel"),
        ({"stride": {"a": 1}}, "stride: is a mapping"),
        ({"padding": -1}, "padding: expected values of 0"),
        ({"padding": "full"}, "padding must be numbers"),
        ({"padding": ((1, 1),)}, "uneven padding is one pair"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"padding": 5, "padding_mode": "reflect"}, "reflect padding of 5"),
        ({"padding_mode": np.zeros(2)}, "padding_mode must be one of"),
        ({"padding": 5, "padding_mode": "circular"}, "circular padding of 5"),
        ({"padding_mode": "mirror"}, "padding_mode must be one of"),
        ({"groups": 3}, "not divisible by 3 groups"),
        ({"groups": 0}, "groups must be a positive integer"),
        ({"transposed": 1}, "transposed must be True or False"),
        ({"transposed": True, "padding_mode": "reflect"}, "padding_mode 'zeros' only"),
        ({"output_padding": 1}, "belongs to transposed"),
        ({"rtol": 0.0}, "rtol must be"),
        ({"max_cells": 0}, "max_cells must be"),
        ({"memory": -1}, "memory must be"),
        ({"start": "warm"}, "start: expected the ConvNorms"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.conv_norms(KERNEL, **{"input_sizes": (4, 4), **options})


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ([], "no kernels"),
        ([torch.ones(2, 2)], "kernel 0: expected"),
        ([torch.ones(2, 2, 3, 3, 3, 3)], "one to three axes"),
        ([torch.ones(2, 0, 3)], "is empty"),
        ([torch.ones(2, 2, 3, dtype=torch.int64)], "dtype"),
        ({"bias": torch.ones(3)}, "no kernels among"),
        (3, "expected a list or a dict"),
    ],
)
def test_bad_kernels_are_named(kernels: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        lipfast.conv_norms(kernels, input_sizes=4)


def test_nan_names_the_kernel() -> None:
    bad = torch.ones(2, 2, 3)
    bad[0, 0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"kernel 'b\.weight'"):
        lipfast.conv_norms({"a": torch.ones(2, 2, 3), "b.weight": bad}, input_sizes=4)


def test_start_of_another_shape_is_an_error() -> None:
    known = lipfast.conv_norms(KERNEL, input_sizes=(4, 4))
    with pytest.raises(ArgumentError, match="had another shape"):
        lipfast.conv_norms(KERNEL, input_sizes=(5, 5), start=known)
    with pytest.raises(ArgumentError, match="keyed otherwise"):
        lipfast.conv_norms({"a": KERNEL}, input_sizes=(4, 4), start=known)


@pytest.mark.parametrize("kernel", [[-1.0, 0.0, 1.0], [1.0, -2.0, 1.0], [-1.0, 1e-9, 1.0]])
@pytest.mark.parametrize("size", [1, 2])
def test_circular_taps_that_cancel_come_to_an_end(kernel: list[float], size: int) -> None:
    taps = torch.tensor(kernel, dtype=torch.float64).reshape(1, 1, 3)
    found = lipfast.conv_norms([taps], input_sizes=[size], padding=1, padding_mode="circular")
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for row in range(size):
        for tap, value in enumerate(kernel):
            matrix[row, (row + tap - 1) % size] += value
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    assert float(found.lower) <= truth * (1 + 1e-12)
    assert truth <= float(found.upper) <= truth * (1 + 1e-2) + 1e-8


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e-310])
def test_circular_taps_that_meet(scale: float, generator: torch.Generator) -> None:
    """Longer kernels than the input, and dilations with a common divisor, in all ranges."""
    for count in range(40):
        taps, size, dilation = 2 + count % 4, 1 + count % 6, 1 + count % 3
        reach = dilation * (taps - 1)
        pads = (reach // 2, reach - reach // 2)
        if max(pads) > size:
            continue
        kernel = scale * torch.randn(2, 3, taps, generator=generator, dtype=torch.float64)
        found = lipfast.conv_norms(
            [kernel],
            input_sizes=[size],
            padding=[(pads,)],
            padding_mode="circular",
            dilation=dilation,
        )
        matrix = conv_matrix(
            kernel / scale,
            (size,),
            stride=(1,),
            padding=[pads],
            dilation=(dilation,),
            padding_mode="circular",
        )
        value = scale * float(torch.linalg.svdvals(matrix)[0])
        assert value * (1 - 1e-9) <= float(found.upper) <= value * 1.002
        assert float(found.lower) <= value * (1 + 1e-9)


def test_native_searches_end(generator: torch.Generator) -> None:
    """Symbols that vanish on a grid, and tolerances below rounding: within the cells they may."""
    none = torch.empty(0, dtype=torch.float64)
    random = torch.randn(2, 3, 3, 1, 4, 5, generator=generator, dtype=torch.float64)
    flat = 1e-2 * random[:1, ..., :4]
    flat[0, 1, 1, 0] += torch.eye(4, dtype=torch.float64)
    cancelling = random - random.mean((1, 2), keepdim=True)
    cases = [(cancelling, [1, 1, 1]), (random, [0, 0, 0]), (flat, [0, 0, 0]), (flat, [5, 4, 1])]
    for taps, grid in cases:
        for rtol in (1e-3, 1e-15, 5e-324):
            for max_cells in (1, 300):
                found = torch.ops.lipfast.conv_norms(
                    [taps], [none], grid, rtol, max_cells, 0, 1 << 30
                )
                lower, upper, right = found[0], found[1], found[-1]
                assert 0 <= float(lower) <= float(upper) < 20 * float(taps.abs().sum())
                assert bool(torch.isfinite(right).all())
    assert float(upper) < 2 * float(lower)
