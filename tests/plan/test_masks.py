"""Masks of -inf: allowed where they are added, exact there, and never a certified NaN."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import NonFiniteError
from lipfast.estimators.enclosure import enclose
from lipfast.estimators.plan import Plan
from lipfast.plan.masks import additive_masks
from lipfast.plan.state import stack

CAUSAL = torch.full((4, 4), -math.inf).triu(1)


class Causal(nn.Module):
    """Attention that is written out, with a table that is added to the scores."""

    def __init__(self, mask: Tensor, *, persistent: bool = True, moved: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.query = nn.LayerNorm(3), nn.Linear(3, 3)
        self.moved = moved
        self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mask = self.mask[: x.shape[1], : x.shape[1]].unsqueeze(0) if self.moved else self.mask
        return (self.query(x) @ x.mT + mask).softmax(-1) @ x


X = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_causal_mask_has_bounds_from_both_sides(persistent: bool, moved: bool) -> None:
    mask = torch.full((6, 6), -math.inf).triu(1) if moved else CAUSAL
    model = Causal(mask.clone(), persistent=persistent, moved=moved).eval()
    large = torch.where(mask == -math.inf, -1e30, 0.0)  # as good as -inf in float64
    other = Causal(large, persistent=persistent, moved=moved).eval()
    found, expected = lipfast.bounds(model, X), lipfast.bounds(other, X)
    assert found.upper.certified and found.lower.certified
    assert found.upper.value == expected.upper.value
    assert found.lower.jacobian.value == pytest.approx(expected.lower.jacobian.value)
    assert 0.9 * found.lower.jacobian.value < found.lower.value <= found.upper.value
    lower = lipfast.lower_bound(model, X)
    assert lower.certified
    assert lower.value == pytest.approx(found.lower.value)


def test_errors_behind_a_mask_hold_the_truth() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + torch.tensor([0.0, -math.inf, 0.25])).softmax(-1)

    plan = Plan.trace(Masked(), torch.zeros(2, 3).double())
    x = torch.tensor([[0.3, 5.0, -0.7], [1.0, -2.0, 40.0]], dtype=torch.float64)
    outputs, errors = enclose(plan, stack([{}], (), torch.float64), x[None])
    for row, output, error in zip(x.tolist(), outputs[0], errors[0], strict=True):
        weights = [mpmath.exp(row[0]), mpmath.mpf(0), mpmath.exp(mpmath.mpf(row[2]) + 0.25)]
        truth = [weight / sum(weights) for weight in weights]
        assert all(
            abs(mpmath.mpf(o) - t) <= e < 1e-12
            for o, t, e in zip(output.tolist(), truth, error.tolist(), strict=True)
        )


@pytest.mark.parametrize("size", [1e200, -1e200])
def test_a_score_that_overflows_is_not_masked(size: float) -> None:
    """The sums of products overflow, in truth they are 0."""

    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            scores = x @ x.mT * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
            return (scores + torch.tensor([0.0, -math.inf])).softmax(-1)[:, :, 0]

    plan = Plan.trace(Scores(), torch.zeros(2, 2, 2).double())
    _, errors = enclose(plan, {}, torch.full((1, 1, 2, 2), size, dtype=torch.float64))
    assert bool((errors[0, 0, 1:] == math.inf).all())


@pytest.mark.parametrize("persistent", [False, True])
def test_a_row_without_an_entry_is_refused(persistent: bool) -> None:
    mask = CAUSAL.clone()
    mask[2] = -math.inf
    model = Causal(mask, persistent=persistent).eval()
    with pytest.raises(NonFiniteError, match=r"softmax.* leaves it no entry"):
        lipfast.upper_bound(model, X)
    with pytest.raises(NonFiniteError):
        lipfast.lower_bound(model, X)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_other_infinite_entries_are_refused(value: float) -> None:
    model = Causal(torch.zeros(4, 4)).eval()
    model.mask[1, 2] = value
    with pytest.raises(NonFiniteError, match="'mask'"):
        lipfast.upper_bound(model, X)


def test_a_constant_that_is_no_number_is_refused() -> None:
    model = Causal(torch.full((4, 4), math.nan), persistent=False).eval()
    with pytest.raises(NonFiniteError, match=r"constant .*mask.* holds NaN"):
        lipfast.upper_bound(model, X)


def test_what_is_multiplied_is_no_mask() -> None:
    class Both(Causal):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.mask[0, 0]

    plan = Plan.trace(Both(CAUSAL.clone()).eval(), X)
    assert additive_masks(plan.graph, plan.computed).isdisjoint({"mask", "query.weight"})
    with pytest.raises(NonFiniteError, match="'mask'"):
        lipfast.upper_bound(Both(CAUSAL.clone()).eval(), X)
    plain = Plan.trace(Causal(CAUSAL.clone(), moved=True).eval(), X)
    assert additive_masks(plain.graph, plain.computed) == {"mask", *_names(plain)}


def _names(plan: Plan) -> set[str]:
    return {f"computed:{node.name}" for node in plan.computed}
