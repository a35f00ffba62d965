"""Products with weights that are no parameters, and in other words than `matmul`: as layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import LipfastError
from lipfast.estimators.plan import Plan
from tests.support.explicit import NORMS, Function, check_enclosure, check_linear, traced

W = torch.sin(torch.arange(6.0) + 1.0).reshape(2, 3)
HEADS = torch.cos(torch.arange(60.0)).reshape(3, 5, 4)
SOBEL = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])[None, None]
HAAR = torch.tensor([[[0.5, 0.5]], [[0.5, -0.5]]])


def as_(x: Tensor, weight: Tensor) -> Tensor:
    return weight.to(x.dtype)


# Bounds are exact for these (kernels: of all sizes), and so is the norm of the explicit matrix.
LAYERS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x: functional.linear(x, as_(x, W)), (3,)),
    "linear with a bias": (lambda x: functional.linear(x, as_(x, W), as_(x, W[:, 0])), (3,)),
    "linear with a vector": (lambda x: functional.linear(x, as_(x, W[0])), (4, 3)),
    "literal": (lambda x: functional.linear(x, x.new_tensor([[1.0, 2.0, 3.0]])), (3,)),
    "x W^T": (lambda x: x @ as_(x, W).T, (3,)),
    "x I": (lambda x: x @ torch.eye(3, dtype=x.dtype), (3,)),
    "x v": (lambda x: (x @ as_(x, W[0]))[:, None], (3,)),
    "x v of more": (lambda x: x @ as_(x, W[0]), (2, 3)),
    "v x": (lambda x: as_(x, W[0]) @ x, (3, 2)),
    "W x": (lambda x: as_(x, W) @ x, (3, 4)),
    "W x of more": (lambda x: as_(x, W) @ x, (2, 3, 4)),
    "from numpy": (lambda x: x @ torch.from_numpy(np.ones((3, 2))).to(x.dtype), (3,)),
    "mm": (lambda x: torch.mm(x, as_(x, W).T), (3,)),
    "mv": (lambda x: torch.mv(x, as_(x, W[0])).unsqueeze(1), (3,)),
    "addmm": (lambda x: torch.addmm(as_(x, W[:1, :2]), x, as_(x, W).T), (3,)),
    "addmm, scaled": (
        lambda x: torch.addmm(as_(x, W[0, :2]), x, as_(x, W).T, alpha=-2.0, beta=0.5),
        (3,),
    ),
    "baddbmm": (
        lambda x: torch.baddbmm(
            torch.zeros(1, dtype=x.dtype), x, as_(x, W.T)[None].expand(x.shape[0], 3, 2)
        ),
        (2, 3),
    ),
    "bmm": (lambda x: torch.bmm(x, as_(x, W.T)[None].expand(x.shape[0], 3, 2)), (2, 3)),
    "inner": (lambda x: torch.inner(x, as_(x, W)), (3,)),
    "inner of more": (lambda x: torch.inner(x, as_(x, W)), (2, 3)),
    "tensordot": (lambda x: torch.tensordot(x, as_(x, W), dims=([1], [1])), (3,)),
    "tensordot, two": (lambda x: torch.tensordot(x, as_(x, HEADS), dims=([2, 1], [1, 0])), (3, 5)),
    "einsum bi,oi->bo": (lambda x: torch.einsum("bi,oi->bo", x, as_(x, W)), (3,)),
    "einsum oi,bi->bo": (lambda x: torch.einsum("oi,bi->bo", as_(x, W), x), (3,)),
    "einsum bi,hij->bhj": (lambda x: torch.einsum("bi,hij->bhj", x, as_(x, HEADS)), (5,)),
    "einsum bhi,hij->bj": (lambda x: torch.einsum("bhi,hij->bj", x, as_(x, HEADS)), (3, 5)),
    "einsum ...i,oi->...o": (lambda x: torch.einsum("...i,oi->...o", x, as_(x, W)), (4, 3)),
    "einsum, implicit": (lambda x: torch.einsum("bi,ji", x, as_(x, W)), (3,)),
    "einsum, turned": (lambda x: torch.einsum("bni,oi->bon", x, as_(x, W)), (4, 3)),
    "einsum, repeated": (
        lambda x: torch.einsum("bi,boi->bo", x, as_(x, W).expand(x.shape[0], 2, 3)),
        (3,),
    ),
    "einsum, outer": (lambda x: torch.einsum("bi,o->bio", x, as_(x, W[0, :1])), (3,)),
}
# A weight for each of several indices: bounded by Frobenius' norm.
SEVERAL: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "einsum bhi,hij->bhj": (lambda x: torch.einsum("bhi,hij->bhj", x, as_(x, HEADS)), (3, 5)),
    "einsum bnhi,hij->bhnj": (
        lambda x: torch.einsum("bnhi,hij->bhnj", x, as_(x, HEADS)),
        (2, 3, 5),
    ),
    "x W_h": (lambda x: x @ as_(x, HEADS), (3, 2, 5)),
    "Sobel": (lambda x: functional.conv2d(x, as_(x, SOBEL)), (1, 5, 6)),
    "Sobel of channels": (
        lambda x: functional.conv2d(x, as_(x, SOBEL).expand(2, 1, 3, 3), groups=2, padding=1),
        (2, 5, 5),
    ),
    "Haar": (lambda x: functional.conv1d(x, as_(x, HAAR), stride=2), (1, 8)),
    "Haar's inverse": (lambda x: functional.conv_transpose1d(x, as_(x, HAAR), stride=2), (2, 4)),
    "3-D": (lambda x: functional.conv3d(x, as_(x, SOBEL)[None]), (1, 3, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bounds_are_the_norms(name: str) -> None:
    function, shape = LAYERS[name]
    check_linear(Function(function), shape)


@pytest.mark.parametrize("name", SEVERAL)
def test_bounds_are_not_below_the_norms(name: str) -> None:
    function, shape = SEVERAL[name]
    check_linear(Function(function), shape, slack=(6.0, 3.0, 6.0))


def test_weights_that_the_module_keeps_without_registering_them() -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.listed = [W.clone()]
            self.plain = W.clone().requires_grad_()
            self.register_buffer("kept", W[:, :2].clone(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = functional.linear(functional.linear(x, self.listed[0]), self.plain.T)
            return functional.linear(hidden[:, :2], self.kept.detach())

    model = Kept()
    bound = lipfast.upper_bound(model, torch.zeros(1, 3))
    truth = torch.linalg.matrix_norm((W[:, :2] @ W.T[:2] @ W).double(), 2)
    assert float(truth) <= bound.value <= 2 * float(truth)
    assert bound.certified
    assert lipfast.lower_bound(model, torch.randn(3, 3)).certified


def test_large_constants_are_weights() -> None:
    table = torch.randn(80, 80, generator=torch.Generator().manual_seed(0)).double()
    truth = float(torch.linalg.matrix_norm(table, 2))
    bound = traced(Function(lambda x: x @ table), (80,)).upper({})
    assert truth <= bound.value <= truth * (1 + 2e-6)


def test_plans_with_constant_weights_are_kept(tmp_path: Path) -> None:
    plan = traced(Function(lambda x: functional.linear(x, as_(x, W))), (3,))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.upper({}).value == plan.upper({}).value


class Forms(nn.Module):
    """``x^T A_k y``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = nn.Bilinear(3, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x[:, :3], x[:, 3:])


def test_bilinear_forms_have_a_bound_on_a_domain() -> None:
    model = Forms().double()
    plan = traced(model, (7,))
    check_enclosure(plan, model, (7,), 1e-12)
    x = 2 * torch.rand(200, 7, generator=torch.Generator().manual_seed(1)).double() - 1
    for norm in NORMS:
        bound = plan.upper(model.state_dict(), norm=norm, domain=lipfast.Box(-1, 1)).value
        largest = float(lipfast.jacobian_norms(model, x, norm=norm).max())
        assert largest <= bound <= 30 * largest
    assert math.isinf(plan.upper(model.state_dict()).value)


def test_einsum_of_two_activations() -> None:
    def attention(x: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bhqk", x, x).softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", scores, x.transpose(1, 2))

    model = Function(attention)
    plan = traced(model, (3, 2, 4))
    assert [node.op for node in plan.graph.nodes].count("lipfast.weighted_rows") == 1
    check_enclosure(plan, model, (3, 2, 4), 1e-11)
    x = 2 * torch.rand(50, 3, 2, 4, generator=torch.Generator().manual_seed(1)).double() - 1
    bound = plan.upper({}, domain=lipfast.Box(-1, 1)).value
    assert float(lipfast.jacobian_norms(model, x).max()) <= bound


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.einsum("bi,bj->ij", x, x),
        lambda x: torch.einsum("bi->i", x),
        lambda x: torch.einsum("bii->bi", x[:, None] * x[..., None]),
        lambda x: torch.tensordot(x, x, dims=([0], [0])),
        lambda x: torch.inner(x, x),
    ],
)
def test_products_that_mix_samples_are_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(LipfastError, match=r"aten|samples"):
        Plan.trace(Function(function), torch.zeros(2, 3))
