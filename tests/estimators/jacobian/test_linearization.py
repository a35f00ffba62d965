"""Jacobians of models that differentiate, batch or multiply sparsely themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import functional as autograd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint

import lipfast
from lipfast.errors import ArgumentError, LipfastError, TraceError
from lipfast.estimators.jacobian.linearization import DerivativeError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, on its sparse tensors

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Inner(nn.Module):
    """Some outputs of a small network, or of its derivatives."""

    def __init__(self, outputs: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        self.sparse = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 0.5]]).to_sparse()
        self.register_buffer("rows", self.sparse.to_sparse_csr())
        self.outputs = outputs

    def scalar(self, x: Tensor) -> Tensor:
        return self.net(x).square().sum(-1)

    def total(self, x: Tensor) -> Tensor:
        return self.scalar(x).sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(self, x)

    def double(self) -> Inner:
        self.sparse = self.sparse.double()
        return super().double()


def _gradient(model: Inner, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.requires_grad_()
    return torch.autograd.grad(model.total(x), x, create_graph=True)[0]


def _gradient_enabled(model: Inner, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return _gradient(model, x)


def _pulled(model: Inner, x: Tensor) -> Tensor:
    y, pull = vjp(model.scalar, x)
    found: Tensor = pull(torch.ones_like(y))[0]
    return found


def _dual(model: Inner, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = model.net(forward_ad.make_dual(x, torch.ones_like(x)))
        return forward_ad.unpack_dual(dual).tangent


def _on_cpu(model: Inner, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        result: Tensor = model.net(x)
        return result


def _without_hooks(model: Inner, x: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        result: Tensor = model.net(x)
        return result


def _of_parameters(model: Inner, x: Tensor) -> Tensor:
    state = dict(model.net.named_parameters())

    def one(sample: Tensor) -> Tensor:
        found: Tensor = grad(lambda p: functional_call(model.net, p, (sample,)).sum())(state)[
            "0.weight"
        ]
        return found

    return vmap(one)(x)


MODELS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap of grad": lambda m, x: vmap(grad(m.scalar))(x),
    "grad": lambda m, x: grad(m.total)(x),
    "vjp": _pulled,
    "jvp": lambda m, x: jvp(m.net, (x,), (torch.ones_like(x),))[1],
    "jvp along the input": lambda m, x: jvp(m.net, (x,), (x,))[1],
    "jacrev": lambda m, x: vmap(jacrev(m.net))(x),
    "jacfwd": lambda m, x: vmap(jacfwd(m.net))(x),
    "hessian": lambda m, x: vmap(hessian(m.scalar))(x),
    "vmap": lambda m, x: vmap(m.net)(x),
    "of parameters": _of_parameters,
    "functional jacobian": lambda m, x: autograd.jacobian(m.total, x, create_graph=True),
    "functional hvp": lambda m, x: autograd.hvp(m.total, x, torch.ones_like(x), create_graph=True)[
        1
    ],
    "functional jvp": lambda m, x: autograd.jvp(m.net, x, torch.ones_like(x), create_graph=True)[1],
    "autograd.grad": _gradient,
    "autograd.grad, enabled": _gradient_enabled,
    "dual numbers": _dual,
    "hooks of its own": _on_cpu,
    "hooks disabled": _without_hooks,
    "sparse.mm": lambda m, x: torch.sparse.mm(m.sparse, m.net(x).T).T,
    "sparse @": lambda m, x: (m.sparse @ x.T).T.sin(),
    "sparse rows": lambda m, x: (m.rows @ x.T).T.sin(),
}


@pytest.mark.parametrize("outputs", MODELS.values(), ids=MODELS)
def test_against_autograd_in_double(outputs: Callable[[Any, Tensor], Tensor]) -> None:
    model, wide = Inner(outputs).eval(), Inner(outputs).eval().double()
    rows = [autograd.jacobian(wide, x[None].double()).reshape(-1, 3) for x in X]
    for norm in (1, 2, math.inf):
        truth = torch.linalg.matrix_norm(torch.stack(rows), norm).float()
        for method in ("auto", "rows", "lanczos") if norm == 2 else ("auto",):
            found = lipfast.jacobian_norms(model, X, norm=norm, method=method)  # type: ignore[arg-type]
            torch.testing.assert_close(found, truth, rtol=2e-4, atol=1e-6)
        with_graph = lipfast.jacobian_norms(model, X, norm=norm, create_graph=True)  # type: ignore[arg-type]
        torch.testing.assert_close(with_graph.detach(), truth, rtol=2e-4, atol=1e-6)
    bound = lipfast.lower_bound(model, X)
    assert bound.jacobian.value == pytest.approx(
        float(torch.linalg.matrix_norm(torch.stack(rows), 2).max()), rel=2e-4
    )


@pytest.mark.long
@pytest.mark.parametrize("outputs", MODELS.values(), ids=MODELS)
def test_upper_bounds_are_above_or_refused(outputs: Callable[[Any, Tensor], Tensor]) -> None:
    model = Inner(outputs).eval()
    try:
        bound = lipfast.upper_bound(model, X)
    except LipfastError:
        return
    assert bound.value >= float(lipfast.jacobian_norms(model, X).max()) * (1 - 1e-6)


@pytest.mark.parametrize(
    ("outputs", "error", "message"),
    [
        (
            lambda m, x: checkpoint(m.net, x, use_reentrant=True),
            DerivativeError,
            "Checkpointing of activations",
        ),
        (
            lambda m, x: linearize(m.net, x)[1](torch.ones_like(x)),
            ArgumentError,
            "autograd's derivative of Inner",
        ),
    ],
)
def test_what_has_no_backward_pass_is_said(
    outputs: Callable[[Any, Tensor], Tensor], error: type[LipfastError], message: str
) -> None:
    with pytest.raises(error, match=message):
        lipfast.jacobian_norms(Inner(outputs), X, method="rows")


def test_a_sparse_constant_is_named() -> None:
    with pytest.raises(TraceError, match=r"constant 'sparse' has layout torch\.sparse_coo"):
        lipfast.upper_bound(Inner(lambda m, x: x @ m.sparse.to_dense()), X)
