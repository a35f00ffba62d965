"""Every op on a CUDA device against the CPU and float64, on streams, in graphs, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import lipfast
from lipfast.errors import ArgumentError, NonFiniteError
from lipfast.estimators.upper.quadratic.verify import verify_certificate
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_secants import PiecewiseLinearChains
from lipfast.ops.chain_stages import Activation, Linear, Stage
from lipfast.ops.cholesky_bounds import cholesky_bounds
from lipfast.ops.hermitian_residual import hermitian_residual
from lipfast.ops.jacobian_reduction import jacobian_reduction
from lipfast.ops.shifted_grams import shifted_grams
from lipfast.ops.stack import stacked
from lipfast.ops.symbol_grams import Frequencies, symbol_grams
from lipfast.ops.tap_products import tap_products
from lipfast.plan.stacked import StackedStateDicts
from lipfast.reference import chain_jacobian_norms as reference_chain
from lipfast.reference import cholesky_bounds as reference_bounds
from lipfast.reference import hermitian_residual as reference_hermitian
from lipfast.reference import jacobian_reduction as reference_reduction
from lipfast.reference import shifted_grams as reference_shifted
from lipfast.reference import symbol_grams as reference_grams
from lipfast.reference import tap_products as reference_products
from tests.support.exact_norms import any_known, assert_known

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SMALL = [(1, 1, 1), (5, 10, 40), (9, 3, 2), (3, 31, 33), (3, 33, 31), (0, 3, 4)]
NARROW = [(1, 1), (33, 31), (10, 50), (50, 10)]
WIDE = [(512, 512), (10, 784), (784, 10), (300, 9000), (2048, 2048)]
LARGE = [(1000, 10, 784), (300, 64, 65), (3, 65, 100), (2, 200, 300)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check_reduction(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    jacobian = normal(*shape, dtype=dtype)
    spectral, frobenius = jacobian_reduction(jacobian.to(device))
    assert spectral.device.type == "cuda"
    truth = reference_reduction.jacobian_reduction(jacobian)
    tolerance = 2e-7 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(spectral.cpu().double(), truth[0], rtol=tolerance, atol=0)
    torch.testing.assert_close(frobenius.cpu().double(), truth[1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_jacobian_reduction_small(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_reduction(shape, dtype, device)


@pytest.mark.hardware
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_jacobian_reduction_large(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    check_reduction(shape, dtype, device)


def chain(dims: tuple[int, ...], dtype: torch.dtype, networks: int) -> tuple[list, list]:
    weights = [
        [normal(b, a, seed=n + a, dtype=dtype) / math.sqrt(a) for a, b in pairwise(dims)]
        for n in range(networks)
    ]
    biases = [[normal(b, seed=n + b, dtype=dtype) for b in dims[1:]] for n in range(networks)]
    return weights, biases


def relu_between(layers: int) -> list[Stage]:
    return [Linear(), *[Activation("relu"), Linear()] * (layers - 1)]


def moved(tensors: list, device: torch.device) -> list:
    return [[tensor.to(device) for tensor in network] for network in tensors]


def check_chain(dims: tuple[int, ...], dtype: torch.dtype, networks: int, device: object) -> None:
    weights, biases = chain(dims, dtype, networks)
    x, stages = normal(67, dims[0], seed=5, dtype=dtype), relu_between(len(dims) - 1)
    found = chain_jacobian_norms(
        x.to(device), moved(weights, device), moved(biases, device), stages
    )
    truth = reference_chain.chain_jacobian_norms(x, weights, biases, stages)
    for one, other in zip(found, truth, strict=True):
        scale = float(truth[1].max())
        torch.testing.assert_close(
            one.cpu().double(), other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(1, 1), (3, 2), (33, 31, 10), (7, 13, 5, 31, 3)], ids=str)
def test_chain_small(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_chain(dims, dtype, 2, device)


@pytest.mark.hardware
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(784, 256, 10), (40, 1000, 500, 10), (60, 90, 70)], ids=str)
def test_chain_large(dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    check_chain(dims, dtype, 70, device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chains_of_stacked_and_of_listed_weights(dtype: torch.dtype, device: torch.device) -> None:
    """One launch for all networks, or one per table of 128 maps: the same numbers."""
    weights, biases = chain((5, 6, 3), dtype, 70)
    x, stages = normal(9, 5, seed=5, dtype=dtype).to(device), relu_between(2)
    columns = [torch.stack(column).to(device) for column in zip(*weights, strict=True)]
    shifts = [torch.stack(column).to(device) for column in zip(*biases, strict=True)]
    rows = [
        [list(row) for row in zip(*(column.unbind() for column in some), strict=True)]
        for some in (columns, shifts)
    ]
    together = chain_jacobian_norms(x, *rows, stages)
    alone = chain_jacobian_norms(x, moved(weights, device), moved(biases, device), stages)
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])


SECANTS = [((3, 2), 2), ((7, 13, 5, 3), 2), ((6, 9, 4), 1), ((6, 9, 4), math.inf)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dims", "norm"), SECANTS, ids=str)
def test_secants_small(
    dims: tuple[int, ...], norm: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Points and certified quotients: those of the CPU's enclosures at the same points."""
    weights, biases = chain(dims, dtype, 5)
    stages, x = relu_between(len(dims) - 1), normal(5, dims[0], seed=3)
    here = PiecewiseLinearChains(weights, biases, stages)
    there = PiecewiseLinearChains(moved(weights, device), moved(biases, device), stages)
    points = there.points(x.to(device), norm, (0.99,), (1.0, 0.01), 100.0)
    assert torch.equal(points[:, 0].cpu(), x)
    values, loose, ends = there.best_quotients(points, norm, 0.99)
    assert not loose.any()
    outputs, _ = here.enclosures(ends.cpu())
    moves, gaps = (
        torch.linalg.vector_norm(pair[:, 0] - pair[:, 1], norm, 1) for pair in (outputs, ends.cpu())
    )
    torch.testing.assert_close(values.cpu(), moves / gaps, rtol=1e-9, atol=0)
    jacobians = torch.linalg.matrix_norm(here.jacobians(x), norm)
    assert bool((values.cpu() >= jacobians * (1 - 1e-9)).all())


def test_stacked_tensors(device: torch.device) -> None:
    """More than one launch takes; views at odd places; types of two bytes and of eight."""
    for dtype, count in ((torch.float32, 1003), (torch.float16, 3), (torch.int64, 2)):
        flat = torch.arange(7 * count).to(dtype)
        tensors = [flat[7 * index + 1 : 7 * index + 6] for index in range(count)]
        there = [tensor.clone().to(device) for tensor in tensors]
        assert torch.equal(stacked(there).cpu(), torch.stack(tensors))
        assert stacked(there).data_ptr() != there[0].data_ptr()
    rows = flat.to(device).reshape(count, 7).unbind()
    assert stacked(rows).data_ptr() == rows[0].data_ptr()


def test_hermitian_residual_small(device: torch.device) -> None:
    for batch, side, length in [(2, 1, 1), (3, 33, 0), (1, 40, 5)]:
        shapes = [(batch, side, side), (batch, side, length), (batch, side, side)]
        case = [torch.complex(normal(*s, seed=i), normal(*s)) for i, s in enumerate(shapes, 1)]
        found = hermitian_residual(*[tensor.to(device) for tensor in case])
        truth = reference_hermitian.hermitian_residual(*case)
        torch.testing.assert_close(found.cpu(), truth, rtol=1e-12, atol=0)


@pytest.mark.parametrize("n", [3, 33, 50])
def test_grams_of_symbols_small(n: int, device: torch.device) -> None:
    axes, periods, shifts = (3, 2, 1), (2**40, 2**40, 1), normal(2)
    taps, symbols = normal(2, 6, n, 4), torch.tensor([1, 0])
    centres = torch.tensor([[2**30 + 1, 2**38, 0], [1, 0, 0]])
    products = tap_products(taps.to(device), axes)
    truth = reference_products.tap_products(taps, axes)
    torch.testing.assert_close(products.cpu(), truth, rtol=1e-12, atol=1e-12)
    chosen = symbols.to(device), centres.to(device)
    found = symbol_grams(products, axes, Frequencies(*chosen, periods), shifts.to(device)).cpu()
    expected = reference_grams.symbol_grams(taps, axes, (symbols, centres, periods), shifts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found, found.mH)


def test_spectral_norms_small_never_below(device: torch.device, cases: int) -> None:
    generator = torch.Generator().manual_seed(1)
    known = [any_known(generator, largest=6) for _ in range(cases)]
    for options in ({}, {"rtol": 1e-2}, {"certify": False}, {"max_passes": 2}, {"memory": 1}):
        norms = lipfast.spectral_norms([entry.matrix.to(device) for entry in known], **options)
        values = zip(known, norms.lower.tolist(), norms.upper.tolist(), strict=True)
        for entry, lower, upper in values:
            assert_known(entry, lower, upper)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [NARROW, pytest.param(WIDE, marks=pytest.mark.hardware)])
def test_spectral_norms_agree_with_the_cpu(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    matrices = [normal(*shape, dtype=dtype) for shape in shapes]
    here, there = (
        lipfast.spectral_norms(matrices),
        lipfast.spectral_norms([matrix.to(device) for matrix in matrices]),
    )
    assert bool(((there.upper - there.lower) <= 1.1e-6 * there.upper).all())
    assert bool((there.lower.cpu() <= here.upper).all())
    assert bool((there.upper.cpu() >= here.lower).all())
    assert there.right[0].device.type == "cuda"


def test_results_repeat_in_any_company(device: torch.device, cases: int) -> None:
    matrices = [normal(65, 40, seed=seed).to(device) for seed in range(cases)]
    together = lipfast.spectral_norms(matrices, certify=False).lower
    assert torch.equal(together, lipfast.spectral_norms(matrices, certify=False).lower)
    for index in (0, cases // 3, cases - 1):
        assert lipfast.spectral_norms([matrices[index]], certify=False).lower[0] == together[index]


def test_little_memory_means_batches_small(device: torch.device) -> None:
    """Matrices that blocks hold, and one that the grid shares; none depends on how they are cut."""
    matrices = [normal(3 + seed % 4, 5, seed=seed).to(device) for seed in range(12)]
    matrices.insert(5, normal(2, 300).to(device))
    whole = lipfast.spectral_norms(matrices, certify=False)
    cut = lipfast.spectral_norms(matrices, certify=False, memory=10_000)
    assert torch.equal(whole.lower, cut.lower) and torch.equal(whole.passes, cut.passes)
    for one, other in zip([*whole.right, *whole.left], [*cut.right, *cut.left], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_certificates_small(dtype: torch.dtype, device: torch.device) -> None:
    """Gram matrices and bounds are those of the reference, of matrices that lie either way."""
    for turned in (False, True):
        w = normal(3, 33, 40, dtype=dtype)
        w = w.mT.contiguous().mT if turned else w
        truth = torch.linalg.matrix_norm(w.double(), 2)
        there = w.mT.to(device).mT if turned else w.to(device)
        grams, scales, shifts = shifted_grams(there, truth.to(device), excess=1e-6)
        known = reference_shifted.shifted_grams(w, truth, excess=1e-6)
        torch.testing.assert_close(grams.cpu(), known[0], rtol=1e-12, atol=1e-14)
        assert torch.equal(scales.cpu(), known[1])
        factors, failures = torch.linalg.cholesky_ex(grams)
        found = cholesky_bounds(there, factors, failures, scales, shifts).cpu()
        bounds = reference_bounds.cholesky_bounds(w, factors.cpu(), failures.cpu(), *known[1:])
        torch.testing.assert_close(found, bounds, rtol=1e-9, atol=0)
        assert bool((truth <= found).all())


def test_stacked_networks_small(device: torch.device) -> None:
    """Bounds of networks that lie together are those of each alone."""
    model = mlp()
    plan = lipfast.compile(model, torch.randn(2, 20))
    stacked = {
        name: torch.stack([value * (1 + 0.1 * index) for index in range(5)]).to(device)
        for name, value in model.state_dict().items()
    }
    networks = StackedStateDicts(stacked)
    for norm in (1, 2, math.inf):
        together = plan.upper(networks, norm=norm)
        alone = [plan.upper(dict(entry), norm=norm) for entry in networks]
        assert [one.value for one in together] == [one.value for one in alone]
        assert all(one.certified for one in together)


def test_other_norms(device: torch.device) -> None:
    matrix = normal(30, 20)
    for norm in (1, math.inf):
        here = lipfast.spectral_norms([matrix], norm=norm)
        there = lipfast.spectral_norms([matrix.to(device)], norm=norm)
        assert bool(there.certified.all())
        torch.testing.assert_close(there.upper.cpu(), here.upper, rtol=1e-13, atol=0)


def test_gradients(device: torch.device) -> None:
    matrix = normal(12, 9).to(device).requires_grad_()
    norms = lipfast.spectral_norms([matrix])
    (gradient,) = torch.autograd.grad(norms.upper.sum(), matrix)
    u, _, v = torch.linalg.svd(matrix.detach())
    torch.testing.assert_close(gradient, torch.outer(u[:, 0], v[0]), rtol=1e-2, atol=1e-3)


@pytest.mark.hardware
def test_many_streams(device: torch.device) -> None:
    """Work on several streams at once gives what it gives on one."""
    jacobians = [normal(64, 10, 100, seed=seed).to(device) for seed in range(8)]
    alone = [jacobian_reduction(jacobian)[0] for jacobian in jacobians]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jacobians]
    found = []
    for stream, jacobian in zip(streams, jacobians, strict=True):
        with torch.cuda.stream(stream):
            norms = lipfast.spectral_norms(list(jacobian[:4]), certify=False).lower
            found.append((jacobian_reduction(jacobian)[0], norms))
    torch.cuda.synchronize()
    for expected, (spectral, lower) in zip(alone, found, strict=True):
        assert torch.equal(spectral, expected)
        torch.testing.assert_close(lower, expected[:4], rtol=1e-5, atol=0)


@pytest.mark.hardware
def test_cuda_graphs(device: torch.device) -> None:
    """Captured once, replayed on other numbers in the same memory."""
    matrices = [normal(40, 30, seed=seed).to(device) for seed in range(50)]
    jacobian = normal(20, 10, 40).to(device)
    weights, biases = chain((40, 64, 10), torch.float64, 2)
    flat = [tensor.to(device) for network in weights for tensor in network]
    flat_biases = [tensor.to(device) for network in biases for tensor in network]
    x = normal(16, 40).to(device)

    def work() -> list[Tensor]:
        return [
            torch.ops.lipfast.spectral_norms(matrices, [], True, 1e-6, 300, False, 0, 1 << 30)[0],
            jacobian_reduction(jacobian)[0],
            chain_jacobian_norms(x, [flat[:2]], [flat_biases[:2]], relu_between(2))[0],
        ]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for tensor in [*matrices, jacobian, x]:
        tensor.mul_(-3.0)
    graph.replay()
    for one, other in zip(captured, work(), strict=True):
        assert torch.equal(one, other)


def test_bad_numbers_and_devices_small(device: torch.device) -> None:
    bad = normal(3, 4)
    bad[1, 2] = math.nan
    with pytest.raises(NonFiniteError, match="matrix 1"):
        lipfast.spectral_norms([normal(2, 2).to(device), bad.to(device)])
    with pytest.raises(ArgumentError, match="matrix 1: is on cpu"):
        lipfast.spectral_norms([normal(2, 2).to(device), normal(2, 2)])
    assert jacobian_reduction(bad[None].to(device))[0].isnan().tolist() == [True]


def test_torch_is_found() -> None:
    """The function that gives the current stream: it is not linked, but looked for."""
    from lipfast import _C_cuda  # noqa: PLC0415 - there is one only where it was built

    assert _C_cuda.bound_to_torch()


def test_conv_norms_agree_with_the_cpu(device: torch.device) -> None:
    """Two kernels of one shape, and one on a grid of frequencies, which goes another way."""
    kernels = [normal(5, 4, 3, 3, seed=seed) for seed in range(3)]
    options = {"input_sizes": (5, 6), "rtol": 1e-2, "padding": 1}
    modes = ["zeros", "zeros", "circular"]
    here = lipfast.conv_norms(kernels, padding_mode=modes, **options)
    there = lipfast.conv_norms([w.to(device) for w in kernels], padding_mode=modes, **options)
    assert there.upper.device.type == "cuda" and bool(there.certified.all())
    for lower, upper in ((here.lower, there.upper.cpu()), (there.lower.cpu(), here.upper)):
        assert bool((lower <= upper).all())
    low, high = (bound.cpu() for bound in there.supremum)
    assert bool((high - low <= 1e-2 * high).all())


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))


def convolutions() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 4, 5)),
        torch.nn.Conv2d(1, 2, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(40, 3),
    )


@pytest.mark.parametrize("make", [mlp, convolutions])
def test_public_calls(make: Callable[[], torch.nn.Module], device: torch.device) -> None:
    """Models on the device stay there, and have the bounds that they have on the CPU."""
    torch.manual_seed(0)
    model = make()
    x = normal(12, 20, dtype=torch.float32)
    expected = lipfast.bounds(model, x)
    norms = lipfast.jacobian_norms(model.to(device), x.to(device))
    assert norms.device.type == "cuda"
    found = lipfast.bounds(model, x.to(device))
    assert next(model.parameters()).device.type == "cuda"
    assert float(found.lower) <= float(expected.upper)
    assert float(expected.lower) <= float(found.upper) <= float(expected.upper) * (1 + 1e-4)
    assert float(norms.max()) <= float(found.upper) * (1 + 1e-5)


def check_quadratic(widths: tuple[int, ...], count: int, device: torch.device) -> None:
    """Chains are as tight as on the CPU, and what proves them there proves them here."""
    torch.manual_seed(0)
    layers = [
        layer
        for pair in pairwise(widths)
        for layer in (torch.nn.Linear(*pair, dtype=torch.float64), torch.nn.GELU())
    ]
    model, x = torch.nn.Sequential(*layers[:-1]), normal(3, widths[0])
    plan = lipfast.compile(model, x)
    state_dicts = [
        {key: value * (1 + 0.1 * index) for key, value in model.state_dict().items()}
        for index in range(count)
    ]
    expected = plan.upper(state_dicts[:4], method="quadratic")
    there = [{key: value.to(device) for key, value in own.items()} for own in state_dicts]
    whole = {key: torch.stack([own[key] for own in there]) for key in there[0]}
    tracker = plan.tracker(method="quadratic")
    for found in (plan.upper(StackedStateDicts(whole), method="quadratic"), tracker.upper(there)):
        for bound, other, own in zip(found, expected, state_dicts, strict=False):
            assert bound.certified and bound.certificate is not None
            assert bound.value <= other.value * 1.02
            assert verify_certificate(bound.certificate, plan, own).value == bound.value
    assert tracker.multipliers is not None
    assert all(own.device.type == "cuda" for own in tracker.multipliers)


def test_quadratic_constraints_small(device: torch.device) -> None:
    check_quadratic((5, 8, 6, 3), 5, device)


@pytest.mark.hardware
@pytest.mark.parametrize("widths", [(40, 256, 256, 10), (784, 1500, 300), (5, *[50] * 6, 5)])
def test_quadratic_constraints_large(widths: tuple[int, ...], device: torch.device) -> None:
    check_quadratic(widths, 200 if max(widths) < 1000 else 2, device)


def test_lower_bounds_of_many_state_dicts(device: torch.device, cases: int) -> None:
    """Stacked or in a list: the values of the CPU, certified."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x = normal(9, 6, dtype=torch.float32)
    plan = lipfast.compile(model, x)
    state_dicts = [
        {key: value * (1 + 0.1 * index) for key, value in model.state_dict().items()}
        for index in range(max(40, cases))
    ]
    expected = [bound.value for bound in plan.lower(state_dicts, x)]
    there = [{key: value.to(device) for key, value in own.items()} for own in state_dicts]
    whole = {key: torch.stack([own[key] for own in there]) for key in there[0]}
    for networks in (there, StackedStateDicts(whole)):
        found = plan.lower(networks, x.to(device))
        assert all(bound.certified for bound in found)
        assert [bound.value for bound in found] == pytest.approx(expected, rel=1e-6)
    wide = plan.lower(there, x.to(device), domain=lipfast.Box(-1.0, 1.0))
    assert all(bool((bound.points.abs() <= 1).all()) for bound in wide)
