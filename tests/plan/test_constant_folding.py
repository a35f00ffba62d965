"""What depends on constants, parameters and the number of samples only."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lipfast
from lipfast.errors import LipfastError
from lipfast.estimators.plan import Plan
from tests.support.explicit import check_enclosure, traced

Combination = Callable[["Folded", Tensor], Tensor]


class Folded(nn.Module):
    """A function of a linear layer's output and of tensors that the module keeps."""

    def __init__(self, function: Combination) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
        self.places = nn.Embedding(5, 3)
        self.register_buffer("factors", torch.tensor([1.0, 2.0, 4.0]))
        self.register_buffer("mask", torch.tensor([[True], [True], [False]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


def ones(x: Tensor, *sizes: int) -> Tensor:
    return torch.ones((x.shape[0], *sizes), dtype=x.dtype)


# One sample is (3,).
ROWS: dict[str, Combination] = {
    "x / k.expand": lambda m, x: x / m.factors.expand(x.shape[0], 3),
    "x / k.expand_as": lambda m, x: x / m.factors.expand_as(x),
    "x * w.expand_as": lambda m, x: x * m.scale.expand_as(x),
    "x / w.expand": lambda m, x: x / m.scale.expand(x.shape[0], -1),
    "x / k.repeat": lambda m, x: x / m.factors.repeat(x.shape[0], 1),
    "x / full": lambda m, x: x / torch.full((x.shape[0], 1), 3.0),
    "x / ones_like": lambda m, x: x / (2 * torch.ones_like(x)),
    "x + zeros_like": lambda m, x: x + torch.zeros_like(x[:, :1]),
    "x * full_like": lambda m, x: x * torch.full_like(x, 0.5),
    "x / exp(w)": lambda m, x: x / torch.exp(m.scale.expand_as(x)),
    "x * exp(w)": lambda m, x: x * torch.exp(m.scale.view(1, -1).expand_as(x)),
    "x - new_zeros": lambda m, x: x - x.new_zeros(x.shape[0], 1),
    "x * new_tensor": lambda m, x: x * x.new_tensor([1.0, 2.0, 4.0]).expand_as(x),
    "bmm": lambda m, x: torch.bmm(
        (torch.eye(3, dtype=x.dtype) * m.factors).expand(x.shape[0], 3, 3), x[:, :, None]
    )[..., 0],
    "x / mask.sum": lambda m, x: x / m.factors.expand(x.shape[0], 3).sum(1, keepdim=True),
    "where": lambda m, x: torch.where(m.factors.expand_as(x) > 1.5, x, 0.5 * x),
    "where a number": lambda m, x: torch.where(m.factors.expand_as(x) > 1.5, x, -3.0),
    "masked_fill": lambda m, x: x.masked_fill((m.factors > 1.5).expand_as(x), 0.0),
    "index": lambda m, x: x * m.factors[torch.ones(x.shape[0], dtype=torch.long)][:, None],
    "cumsum": lambda m, x: x * ones(x, 3).cumsum(1),
    "one of them": lambda m, x: x * ones(x, 3).cumsum(1)[0],
    "turned": lambda m, x: x * ones(x, 3, 2).cumsum(1).transpose(0, 1).permute(1, 2, 0)[:, 1],
    "viewed": lambda m, x: x * ones(x, 3).cumsum(1).view(x.shape[0], 1, 3).flatten(1),
    "squeezed": lambda m, x: x * ones(x, 1, 3).cumsum(2).squeeze(1),
    "summed twice": lambda m, x: x * ones(x, 2, 3).sum(1).cumsum(1),
    "selected": lambda m, x: x * ones(x, 2, 3).cumsum(2)[:, 1],
    "joined to itself": lambda m, x: x * torch.cat([ones(x, 1), 2 * ones(x, 2)], 1),
    "stacked": lambda m, x: x * torch.stack([ones(x, 3), 2 * ones(x, 3)], 1).sum(1),
    "cast": lambda m, x: x * torch.ones(x.shape[0], 3, dtype=torch.long).type_as(x),
    "truth values": lambda m, x: x * (~torch.zeros(x.shape[0], 3, dtype=torch.bool)).to(x.dtype),
    "softmax": lambda m, x: x * ones(x, 3).cumsum(1).amax(1, keepdim=True),
    "projected": lambda m, x: x + functional.linear(ones(x, 3), m.layer.weight, m.scale),
    "einsum": lambda m, x: torch.einsum("bi,bi->b", x, m.factors.expand_as(x))[:, None],
}
# One sample is (3, 3).
SEQUENCES: dict[str, Combination] = {
    "class token": lambda m, x: torch.cat([m.scale.expand(x.shape[0], 1, 3), x], 1),
    "zeros in front": lambda m, x: torch.cat([torch.zeros(x.shape[0], 2, 3), x], 1),
    "token and places": lambda m, x: (
        torch.cat([m.scale.expand(x.shape[0], 1, 3), x], 1) + m.places(torch.arange(4))
    ),
    "places of all samples": lambda m, x: (
        x + m.places(torch.arange(3)[None].expand(x.shape[0], -1))
    ),
    "mean over a mask": lambda m, x: (
        (x * m.mask.expand(x.shape[0], 3, 1)).sum(1) / m.mask.expand(x.shape[0], 3, 1).sum(1)
    ),
    "picked": lambda m, x: x[:, torch.tensor([2, 0])],
    "lengths": lambda m, x: (
        x * (torch.arange(3) < torch.full((x.shape[0], 1), 2))[..., None].to(x.dtype)
    ),
}
CASES = {name: (f, (3,)) for name, f in ROWS.items()}
CASES |= {name: (f, (3, 3)) for name, f in SEQUENCES.items()}


@pytest.mark.parametrize("name", CASES)
def test_bounds_of_what_meets_it(name: str) -> None:
    function, shape = CASES[name]
    model = Folded(function).eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    truth = largest_norm(model, x)
    bounds = lipfast.bounds(model, x)
    assert bounds.lower.certified
    assert bounds.upper.certified
    assert truth * (1 - 1e-6) <= bounds.lower.value <= bounds.upper.value <= 4 * truth
    assert bounds.upper.value >= truth * (1 - 1e-7)  # constants of the code are float32
    found = float(lipfast.jacobian_norms(model, x).max())
    assert found == pytest.approx(truth, rel=1e-5)


def largest_norm(model: nn.Module, x: Tensor) -> float:
    """Of the Jacobians at the samples, each alone, by float64 autograd."""
    double = copy.deepcopy(model).double()
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        found = [
            torch.autograd.functional.jacobian(double, sample[None]).reshape(-1, sample.numel())
            for sample in x.double()
        ]
    finally:
        torch.set_default_dtype(default)
    return max(float(torch.linalg.matrix_norm(matrix, 2)) for matrix in found)


def count(x: Tensor) -> int:
    return x.shape[0]


# The number of samples, or their order, is seen.
TOLD_APART: dict[str, Combination] = {
    "x / B": lambda m, x: x / count(x),
    "x / tensor of B": lambda m, x: x / torch.full((1,), count(x)),
    "x * arange": lambda m, x: x * torch.arange(count(x))[:, None],
    "x + arange": lambda m, x: x + torch.arange(count(x)).view(-1, 1),
    "x / sum of the mask": lambda m, x: x / ones(x, 3).sum(),
    "x / sum over samples": lambda m, x: x / ones(x, 3).sum(0),
    "x * cumsum over samples": lambda m, x: x * ones(x, 3).cumsum(0),
    "x / (2 B)": lambda m, x: x / torch.full((count(x), 1), 2 * count(x)),
    "a causal mask of samples": lambda m, x: torch.ones(count(x), count(x)).tril() @ x,
    "an identity of samples": lambda m, x: torch.eye(count(x)) @ x,
    "embedded places of samples": lambda m, x: x + m.places(torch.arange(count(x))),
    "flipped over samples": lambda m, x: x * ones(x, 3).cumsum(0).flip(0),
    "a matrix product over samples": lambda m, x: x + (ones(x, 3).T @ ones(x, 3)),
    "softmax over samples": lambda m, x: x * ones(x, 3).softmax(0),
    "rows of two samples": lambda m, x: x * ones(x, 3).repeat(2, 1)[: count(x)],
    "einsum over its samples": lambda m, x: torch.einsum("bi,cj->bij", x, ones(x, 3)).sum(2),
    "einsum over its samples, too": lambda m, x: (
        x * torch.einsum("bj,cj->b", x, ones(x, 3))[:, None]
    ),
    "tensordot over its samples": lambda m, x: torch.tensordot(x, ones(x, 3), dims=([1], [1])),
    "einsum of samples alone": lambda m, x: x * torch.einsum("bj->j", ones(x, 3)),
    "filled with B": lambda m, x: x * torch.full((3,), count(x)),
    "random": lambda m, x: x + torch.rand(count(x), 3),
}


@pytest.mark.parametrize("name", TOLD_APART)
def test_what_tells_samples_apart_is_refused(name: str) -> None:
    with pytest.raises(LipfastError, match=r"sample|no rule|traced?"):
        Plan.trace(Folded(TOLD_APART[name]).eval(), torch.zeros(2, 3))


def test_tensors_for_one_sample_hold_for_any_number() -> None:
    """A plan evaluates any number of samples, as the model does."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        for function, shape in CASES.values():
            model = Folded(function).double().eval()
            check_enclosure(traced(model, shape), model, shape, 1e-11)
    finally:
        torch.set_default_dtype(default)


class Patches(nn.Module):
    """An image model as they come: patches, a class token, places, attention, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.register_buffer("ids", torch.arange(5)[None], persistent=False)
        self.table = nn.Embedding(5, 8)
        self.norm, self.qkv, self.head = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor, bool_masked_pos: Tensor | None = None) -> Tensor:
        b = x.shape[0]
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.token.expand(b, -1, -1), tokens], 1) + self.places
        hidden = hidden + self.table(self.ids[:, : hidden.shape[1]])
        mask = torch.ones((b, hidden.shape[1]))[:, None, None, :].to(x.dtype)
        extended = (1.0 - mask) * torch.finfo(x.dtype).min
        q, k, v = self.qkv(self.norm(hidden)).view(b, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2)) / 2.0 + extended
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, 5, 8)
        return self.head((hidden + mixed)[:, 0])


def test_a_transformer_of_images_has_bounds() -> None:
    model = Patches().eval()
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    bounds = lipfast.bounds(model, x, domain=lipfast.Box(0, 1))
    truth = largest_norm(model, x)
    assert bounds.lower.certified
    assert truth * (1 - 1e-6) <= bounds.lower.value
    assert bounds.lower.value <= bounds.upper.value < 1e6


def _heads(m: Folded, x: Tensor) -> list[Tensor]:
    """Queries, keys and values of one head."""
    return [x[:, None], m.layer(x)[:, None] / 3.0, x[:, None] * m.scale]


def _extended_mask(m: Folded, x: Tensor) -> Tensor:
    b, n, _ = x.shape
    wide = torch.ones((b, n))[:, None, None, :].expand(b, 1, n, n).to(x.dtype)
    inverted = 1.0 - wide
    mask = inverted.masked_fill(inverted.to(torch.bool), torch.finfo(x.dtype).min)
    q, k, v = _heads(m, x + m.places(torch.zeros(b, n, dtype=torch.long)))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]


def _causal_choice(m: Folded, x: Tensor) -> Tensor:
    q, k, v = _heads(m, x)
    causal = torch.tril(torch.ones(3, 3, dtype=torch.bool)).view(1, 1, 3, 3)
    least = torch.full([], torch.finfo(x.dtype).min, dtype=x.dtype)
    scores = torch.where(causal, q @ k.transpose(-1, -2), least)
    return (scores.softmax(-1).type_as(v) @ v)[:, 0]


def _turned_by_places(m: Folded, x: Tensor) -> Tensor:
    places = torch.arange(3)[None].expand(x.shape[0], -1)[:, None, :].to(x.dtype)
    frequencies = m.factors[None, :, None].expand(x.shape[0], -1, 1)
    angles = (frequencies @ places).transpose(1, 2)
    return x * angles.cos() + x.flip(2) * angles.sin()


def _learnt_queries(m: Folded, x: Tensor) -> Tensor:
    queries = m.places.weight[:2].unsqueeze(0).repeat(x.shape[0], 1, 1)
    _, k, v = _heads(m, x)
    return functional.scaled_dot_product_attention(queries[:, None], k, v)[:, 0]


@pytest.mark.parametrize(
    "function", [_extended_mask, _causal_choice, _turned_by_places, _learnt_queries]
)
def test_masks_places_and_queries_of_transformers(function: Combination) -> None:
    model = Folded(function).eval()
    x = 2 * torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(2)) - 1
    bounds = lipfast.bounds(model, x, domain=lipfast.Box(-1, 1))
    assert bounds.lower.certified
    truth = largest_norm(model, x)
    assert truth * (1 - 1e-6) <= bounds.lower.value <= bounds.upper.value < 1e3


def test_an_output_that_is_the_same_for_all_samples_has_the_constant_0() -> None:
    model = Folded(lambda m, x: m.scale.expand(x.shape[0], 3) * 2)
    assert lipfast.upper_bound(model, torch.zeros(1, 3)).value == 0.0
