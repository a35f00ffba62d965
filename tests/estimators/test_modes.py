"""Public calls in whatever mode of torch the caller is: the same results, and the mode stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lipfast
from lipfast.ops import denormals

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 2, 5, 5, generator=GENERATOR)
ROWS = torch.randn(3, 4, generator=GENERATOR)
TOKENS = torch.randn(3, 4, 4, generator=GENERATOR)
KERNEL = torch.randn(3, 2, 3, 3, generator=GENERATOR)
MATRIX = torch.randn(5, 6, generator=GENERATOR)
torch.manual_seed(0)
CONVOLUTIONAL = nn.Sequential(
    *[nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(3)],
    *[nn.Conv2d(3, 3, 1, padding_mode="circular"), nn.Flatten(), nn.Linear(27, 3)],
).eval()
COMPUTED = nn.Sequential(
    parametrizations.weight_norm(nn.Linear(4, 4)),
    nn.Tanh(),
    parametrizations.orthogonal(nn.Linear(4, 4)),
).eval()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query = nn.LayerNorm(4), nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return (self.query(x) @ x.mT / 2.0 + self.mask).softmax(-1) @ x


ATTENTION = Attention().eval()


def norms(result: object) -> list[float]:
    return [float(v) for v in (*result.lower, *result.upper)]  # type: ignore[attr-defined]


def both(model: nn.Module, x: Tensor) -> list[float]:
    found = lipfast.bounds(model, x, domain=lipfast.Ball(100.0))
    assert found.lower.certified and found.upper.certified
    return [found.lower.value, found.upper.value]


def searched(search: str, **options: float) -> list[float]:
    found = lipfast.lower_bound(CONVOLUTIONAL, IMAGES, search=search, **options)  # type: ignore[arg-type]
    return [found.value]


def tracked() -> list[float]:
    tracker = lipfast.compile(CONVOLUTIONAL, IMAGES).tracker()
    state = CONVOLUTIONAL.state_dict()
    first = tracker.upper(state).value
    nearby = {k: v * (1 + 1e-6) if v.is_floating_point() else v for k, v in state.items()}
    return [first, tracker.upper(nearby).value]


CALLS: dict[str, Callable[[], list[float]]] = {
    "column sums": lambda: [
        lipfast.upper_bound(CONVOLUTIONAL, IMAGES, norm=1).value,
        *norms(lipfast.spectral_norms([MATRIX], norm=1)),
    ],
    "spectral norms": lambda: norms(lipfast.spectral_norms([MATRIX])),
    "convolutions": lambda: norms(lipfast.conv_norms([KERNEL], input_sizes=(5, 5), padding=1)),
    "convolutions, circular": lambda: norms(
        lipfast.conv_norms([KERNEL], input_sizes=(5, 5), padding=1, padding_mode="circular")
    ),
    "convolutional": lambda: both(CONVOLUTIONAL, IMAGES),
    "attention": lambda: both(ATTENTION, TOKENS),
    "computed weights": lambda: both(COMPUTED, ROWS),
    "Jacobians": lambda: lipfast.jacobian_norms(CONVOLUTIONAL, IMAGES).tolist(),
    "Jacobians of attention": lambda: lipfast.jacobian_norms(
        ATTENTION, TOKENS, method="lanczos"
    ).tolist(),
    "gradients": lambda: lipfast.input_gradient_norms(
        lambda x: CONVOLUTIONAL(x).square().sum(1), IMAGES
    ).tolist(),
    "convex": lambda: searched("convex", draws=10),
    "neighbourhood": lambda: searched("neighbourhood", radius=0.1, draws=8),
    "ascent": lambda: searched("ascent", steps=3),
    "pairs": lambda: searched("pairs"),
    "tracker": tracked,
}


class DefaultDevice(AbstractContextManager[None]):
    """Another default device: meta holds no data, so nothing that lies there goes unnoticed."""

    def __enter__(self) -> None:
        torch.set_default_device("meta")

    def __exit__(self, *exception: object) -> None:
        torch.set_default_device(None)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": DefaultDevice,
}


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_depend_on_the_mode(name: str) -> None:
    expected = CALLS[name]()
    assert all(math.isfinite(value) for value in expected)
    for mode in MODES.values():
        before = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        with mode():
            inside = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            found = CALLS[name]()
            assert (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == inside
        assert (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")) == before
        assert found == pytest.approx(expected, rel=1e-5)


def test_kernels_that_are_inference_tensors() -> None:
    with torch.inference_mode():
        kernel = KERNEL.clone()
        first = lipfast.conv_norms([kernel], input_sizes=(5, 5))
        kernel.mul_(3.0)  # uncounted: the proof must hold a copy
        again = lipfast.conv_norms([kernel], input_sizes=(5, 5), start=first)
    fresh = lipfast.conv_norms([3.0 * KERNEL], input_sizes=(5, 5))
    assert float(again.lower[0]) <= float(fresh.upper[0])
    assert float(fresh.lower[0]) <= float(again.upper[0])


def test_the_denormal_test_runs_where_the_proofs_do() -> None:
    with DefaultDevice():
        assert not denormals.denormals_flushed()
        if torch.set_flush_denormal(True):
            try:
                assert denormals.denormals_flushed()
            finally:
                torch.set_flush_denormal(False)
