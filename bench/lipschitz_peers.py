"""Upper bounds of packages that people use for them. None is a dependency, none minds rounding.

Each takes the matrices of a chain with ReLU between them, first to last, and returns one number.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from collections.abc import Callable

import numpy as np
import pytest
from torch import Tensor

Peer = Callable[[list[Tensor]], float]


def lipsdp_by_clarabel(weights: list[Tensor]) -> float:
    """LipSDP-Neuron (Fazlyab et al., 2019) as one problem of cvxpy, Clarabel's own tolerances.

    With inputs and all hidden values in one vector, ``A`` takes it to the activations' arguments
    and ``B`` to their values; one multiplier per unit.
    """
    cp = importlib.import_module("cvxpy")
    matrices = [weight.double().numpy() for weight in weights]
    inputs, units = matrices[0].shape[1], [len(matrix) for matrix in matrices[:-1]]
    total = sum(units)
    a = np.zeros((total, inputs + total))
    row = column = 0
    for matrix in matrices[:-1]:
        rows, columns = matrix.shape
        a[row : row + rows, column : column + columns] = matrix
        row, column = row + rows, column + columns
    b = np.hstack([np.zeros((total, inputs)), np.eye(total)])
    first = np.diag([1.0] * inputs + [0.0] * total)
    last = np.zeros((len(matrices[-1]), inputs + total))
    last[:, -units[-1] :] = matrices[-1]
    square, multipliers = cp.Variable(nonneg=True), cp.Variable(total, nonneg=True)
    t = cp.diag(multipliers)
    slopes = a.T @ t @ b + b.T @ t @ a - 2 * b.T @ t @ b
    problem = cp.Problem(cp.Minimize(square), [slopes - square * first + last.T @ last << 0])
    problem.solve(solver=cp.CLARABEL)
    assert problem.status == "optimal", problem.status
    return math.sqrt(square.value)


def _eclipse(method: str, weights: list[Tensor]) -> float:
    package = importlib.import_module("eclipse_nn")
    with contextlib.redirect_stdout(io.StringIO()):  # it says where it falls back
        return float(package.LipConstEstimator(weights=weights).estimate(method))


def eclipse(weights: list[Tensor]) -> float:
    """ECLipsE (Xu and Sivaranjani, 2024): one semidefinite problem per layer."""
    return _eclipse("ECLipsE", weights)


def eclipse_fast(weights: list[Tensor]) -> float:
    """ECLipsE-Fast, the closed form."""
    return _eclipse("ECLipsE_Fast", weights)


CLARABEL = "LipSDP (cvxpy, Clarabel)"
ECLIPSE, ECLIPSE_FAST = "peer (ECLipsE)", "peer (ECLipsE-Fast)"
LIPSCHITZ_PEERS: dict[str, tuple[Peer, tuple[str, ...]]] = {
    CLARABEL: (lipsdp_by_clarabel, ("cvxpy", "clarabel")),
    ECLIPSE: (eclipse, ("eclipse_nn",)),
    ECLIPSE_FAST: (eclipse_fast, ("eclipse_nn",)),
}


def peer_or_skip(name: str) -> Peer:
    """The peer; skips a benchmark of one that cannot be imported, with the reason."""
    peer, modules = LIPSCHITZ_PEERS[name]
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{name}: {error} (pip install cvxpy clarabel eclipse-nn)")
    return peer
