"""Residual layers ``x + A s(B x + c)``: 1-Lipschitz ones are proved to be, others stay above."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lipfast.estimators.plan import Plan
from lipfast.estimators.results import UpperBound
from lipfast.graph.nodes import Node, Reference
from lipfast.ops.spectral_norms import spectral_norms
from lipfast.rules.registry import Call
from lipfast.rules.residual import residual, residual_layer
from lipfast.rules.upward import Upward


class Layer(nn.Module):
    """Weights of a layer with 5 features and 7 units, in the wording of `form`."""

    def __init__(self, form: str, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.form = form
        self.w = nn.Parameter(torch.randn(7, 5, generator=generator))
        self.b = nn.Parameter(torch.randn(7, generator=generator))
        self.q = nn.Parameter(torch.randn(7, generator=generator))
        norm = torch.linalg.matrix_norm(self.w.detach().double(), 2)
        self.register_buffer("norm", (norm * (1 + 1e-7)).float())

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.linear(x, self.w, self.b)
        if self.form.startswith("sll"):
            q = torch.exp(self.q)
            t = 1 / ((self.w @ self.w.T).abs() * q[None] / q[:, None]).sum(1)
            s = functional.relu(functional.linear(x, self.w) + self.b)
            if self.form == "sll, scaled after":
                return x - (2.0 * (t * torch.tanh(hidden))) @ self.w
            return x - 2 * functional.linear(t * s, self.w.T)
        scale = 2 / self.norm**2
        if self.form == "cpl":
            return x - scale * functional.linear(functional.relu(hidden), self.w.T)
        if self.form == "cpl, turned":
            return (scale * (functional.hardtanh(x @ self.w.T + self.b) @ self.w)) - x
        return x + (-scale * functional.leaky_relu(hidden, 0.2)) @ self.w


FORMS = ["sll", "sll, scaled after", "cpl", "cpl, turned", "cpl, added"]


def upper(model: nn.Module, norm: float = 2, **options: object) -> UpperBound:
    plan = Plan.trace(model, torch.zeros(2, 5))
    return plan.upper(model.state_dict(), norm=norm, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_are_one_lipschitz_by_construction(form: str) -> None:
    model = Layer(form)
    bound = upper(model)
    assert bound.certified
    assert 1.0 - 1e-9 <= bound.value <= 1.0 + 1e-6
    assert upper(model, simplify=False).value <= 1.0 + 1e-6
    assert upper(model, norm=math.inf).value > 2.0  # the constraint is one of norm 2
    sources = bound.composition.sources(len(bound.layers))
    total = sum(sources.layers) + sources.other + sources.branches
    assert total == pytest.approx(bound.log_value, abs=1e-9)


def test_deep_networks_of_them() -> None:
    layers = [Layer("sll", seed) for seed in range(4)] + [Layer("cpl", seed) for seed in range(4)]
    assert upper(nn.Sequential(*layers)).value <= 1.0 + 1e-5


def largest_norm(a: Tensor, b: Tensor) -> float:
    """The norm of I + A D B over all patterns D of zeros and ones."""
    patterns = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(b)))).double()
    maps = torch.eye(len(a)).double() + torch.einsum("ik,pk,kj->pij", a, patterns, b)
    return float(torch.linalg.matrix_norm(maps, 2).max())


def layer_of(a: Tensor, b: Tensor) -> Call:
    """``x + A relu(B x)`` as the rule sees it, for a constant of x that is 1."""
    x, branch = Reference("node", "x"), Reference("node", "branch")
    total = Node("y", "aten.add", (x, branch), shape=(len(a),))
    first, second = Reference("parameter", "b"), Reference("parameter", "a")
    node = residual_layer(total, (0, (first, False), (), (1.0,), (second, False)))
    norms = [Upward.of(float(spectral_norms([value]).upper[0])) for value in (a, b)]
    operands = [Upward.of(1.0), norms[0] * norms[1]]
    shapes = [(len(a),), (len(a),)]
    return Call(node, 2, operands, shapes, 0.0, {"a": a, "b": b})


@pytest.mark.parametrize("seed", range(12))
def test_never_below_the_norms_of_all_patterns(seed: int) -> None:
    """Near to and far from layers that are 1-Lipschitz, also where the scaling is too large."""
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(6, 4, generator=generator).double()
    size = float(torch.linalg.matrix_norm(b, 2)) ** 2
    scale = [0.3, 1.0, 2.0, 2.02, 2.5, 4.0][seed % 6] / size
    noise = [0.0, 1e-3][seed // 6] * torch.randn(4, 6, generator=generator).double()
    a = -scale * b.T + noise / size
    truth = largest_norm(a, b)
    call = layer_of(a, b)
    bound = residual(call).value
    plain = 1 + float(torch.linalg.matrix_norm(a, 2) * torch.linalg.matrix_norm(b, 2))
    assert truth * (1 - 1e-12) <= bound <= plain * (1 + 1e-5)
    if seed % 6 < 3:
        assert bound <= 1.05  # 1-Lipschitz but for the noise


@pytest.mark.parametrize("function", [torch.erf, torch.sin, torch.abs])
def test_other_slopes_are_not_taken_for_these(function: object) -> None:
    class Other(Layer):
        def forward(self, x: Tensor) -> Tensor:
            hidden = function(functional.linear(x, self.w))  # type: ignore[operator]
            return x - 2 / self.norm**2 * (hidden @ self.w)

    assert upper(Other("")).value > 2.0


def test_rows_that_are_scaled_are_not_taken_for_units() -> None:
    class Square(nn.Module):
        """5 units of 5 features, scaled before and after A by the same vector."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linalg.qr(torch.randn(5, 5))[0])
            self.t = nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.t * ((self.t * functional.relu(x @ self.w.T)) @ self.w)

    torch.manual_seed(0)
    model = Square()
    w, t = model.w.detach().double(), model.t.detach().double()
    truth = largest_norm(-(t[:, None] * w.T * t), w)
    assert truth > 1.5
    assert upper(model).value >= truth


def test_other_residual_layers_are_left_alone() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a(torch.relu(self.b(x)))

    plan = Plan.trace(Plain(), torch.zeros(2, 5))
    assert plan.joined is plan.unfolded
