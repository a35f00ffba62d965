"""Where kernels end: nothing to do, addresses that are far apart, sizes that they refuse."""

from __future__ import annotations

import pytest
import torch

from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Linear
from lipfast.ops.cholesky_bounds import cholesky_bounds
from lipfast.ops.hermitian_residual import hermitian_residual
from lipfast.ops.shifted_grams import shifted_grams
from lipfast.ops.stack import stacked
from lipfast.ops.symbol_grams import Frequencies, symbol_grams
from lipfast.ops.tap_products import tap_products


def test_batches_of_nothing(device: torch.device) -> None:
    none, empty = torch.zeros(0, 3, 4, device=device), torch.zeros(0, device=device).double()
    grams, scales, shifts = shifted_grams(none, empty, excess=1e-6)
    assert grams.shape == (0, 3, 3) and scales.shape == shifts.shape == (0,)
    assert cholesky_bounds(none, grams, empty.int(), scales, shifts).shape == (0,)
    pairs = grams.to(torch.complex128)
    assert hermitian_residual(pairs, pairs[:, :, :0], pairs).shape == (0, 2)
    products = tap_products(none.double()[:, None], (1, 1, 1))
    assert products.shape == (0, 1, 3, 3)
    at = Frequencies(empty.long(), empty.long().reshape(0, 3), (1, 1, 1))
    assert symbol_grams(products, (1, 1, 1), at, empty).shape == (0, 3, 3)
    assert stacked([none[0:0], none.clone()]).shape == (2, 0, 3, 4)


def test_tensors_to_stack_may_lie_far_apart(device: torch.device) -> None:
    """A launch has offsets of 32 bits; these are odd numbers of bytes apart."""
    places = (0, 3, 2**32 + 1, 2**32 + 30)
    flat = torch.empty(places[-1] + 5, dtype=torch.uint8, device=device)
    for index, place in enumerate(places):
        flat[place : place + 3] = index + 1
    found = stacked([flat[place : place + 3] for place in places])
    assert found.tolist() == [[index + 1] * 3 for index in range(len(places))]


def test_sides_beyond_what_is_proved(device: torch.device) -> None:
    matrix = torch.empty(2**30, 0, device=device)
    with pytest.raises(RuntimeError, match=r"matrix 0: is 1073741824 x 0; .* sides below 2\^30"):
        torch.ops.lipfast.spectral_norms([matrix], [], False, 1e-6, 1, False, 0, 1)


@pytest.mark.stub
def test_chains_need_shared_memory(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIPFAST_STUB_SHARED", "50000")
    x, weight = torch.ones(2, 3, device=device), torch.ones(10, 3, device=device)
    with pytest.raises(RuntimeError, match=r"a block needs \d+ bytes of shared memory, the device"):
        chain_jacobian_norms(x, [[weight]], [[None]], [Linear(), Activation("relu")])
