"""The spectral norms of packages that people use for them. None is a dependency of this project.

Each is called on one matrix, and none of them bounds the norm from
above: all but weightwatcher iterate from below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.baselines import POWER_ITERATIONS

Peer = Callable[[Tensor], object]


def torch_parametrization(weight: Tensor) -> object:
    """`torch.nn.utils.parametrizations.spectral_norm`: the norm that the weight is divided by."""
    rows, cols = weight.shape
    layer = nn.Linear(cols, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    # Registration iterates 15 times itself, and evaluates the weight once or twice to check it.
    nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    parametrization: Any = layer.get_submodule("parametrizations.weight.0")
    parametrization.n_power_iterations = POWER_ITERATIONS - 15
    return layer.weight


def weightwatcher(weight: Tensor) -> object:
    """The singular values that the package's analysis starts from, without its fits."""
    values = importlib.import_module("weightwatcher.RMT_Util").svd_vals(weight.numpy())
    return values.max()


def deel_torchlip(weight: Tensor) -> object:
    """The package's power iteration, as long as the naive one.

    Without a start vector it doubles maxiter.
    """
    normalizers = importlib.import_module("deel.torchlip.normalizers")
    return normalizers.spectral_normalization(weight, None, eps=0.0, maxiter=POWER_ITERATIONS // 2)


PEERS: dict[str, Peer] = {
    "peer (torch parametrization)": torch_parametrization,
    "peer (weightwatcher)": weightwatcher,
    "peer (deel-torchlip)": deel_torchlip,
}
_MODULES = {"peer (weightwatcher)": "weightwatcher", "peer (deel-torchlip)": "deel.torchlip"}


def skip_unless_installed(name: str) -> None:
    """Skips a benchmark of a peer that is not there, or that cannot be imported, with the reason.

    A search for the module is not enough: a peer may lack dependencies of its own.
    """
    module = _MODULES.get(name)
    if module is None:
        return
    try:
        importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")


def norms(peer: Peer, matrices: list[Tensor]) -> list[object]:
    """Norms of matrices by one call per matrix, without gradients."""
    with torch.no_grad():
        return [peer(matrix) for matrix in matrices]
