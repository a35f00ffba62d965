"""`nn.MultiheadAttention` and what is built of it: masks, weights as a result, more keys."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import NonFiniteError
from lipfast.estimators.plan import Plan
from tests.support.explicit import check_enclosure, traced

Call = Callable[[nn.MultiheadAttention, Tensor], Any]


def later(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


def padding(x: Tensor) -> Tensor:
    return (torch.arange(x.shape[1]) >= 3)[None].expand(x.shape[0], -1)


def hidden(n: int) -> Tensor:
    return torch.zeros(n, n).masked_fill(later(n), -math.inf)


CALLS: dict[str, Call] = {
    "weights that nobody reads": lambda a, x: a(x, x, x)[0],
    "no weights": lambda a, x: a(x, x, x, need_weights=False)[0],
    "weights": lambda a, x: a(x, x, x)[1],
    "weights of each head": lambda a, x: a(x, x, x, average_attn_weights=False)[1],
    "both": lambda a, x: a(x, x, x),
    "truth values": lambda a, x: a(x, x, x, attn_mask=later(x.shape[1]))[0],
    "numbers": lambda a, x: a(x, x, x, attn_mask=hidden(x.shape[1]))[0],
    "a hint": lambda a, x: a(
        x, x, x, attn_mask=hidden(x.shape[1]), is_causal=True, need_weights=False
    )[0],
    "a hint and weights": lambda a, x: a(x, x, x, attn_mask=hidden(x.shape[1]), is_causal=True),
    "padding": lambda a, x: a(x, x, x, key_padding_mask=padding(x))[0],
    "padding by numbers": lambda a, x: a(
        x, x, x, key_padding_mask=-3.0 * padding(x).to(torch.get_default_dtype())
    )[0],
    "both masks": lambda a, x: a(x, x, x, attn_mask=later(x.shape[1]), key_padding_mask=padding(x)),
    "other keys": lambda a, x: a(x, x[:, :2], x[:, :2] * 2.0)[0],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
}


class Attending(nn.Module):
    def __init__(self, call: Call, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call = call
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Any:
        return self.call(self.attention, x)


class Flat(nn.Module):
    """All results in one, for what compares with the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        found = self.model(x)
        parts = found if isinstance(found, tuple) else (found,)
        return torch.cat([part.flatten(1) for part in parts], 1)


@pytest.fixture(autouse=True)
def _double_precision() -> Any:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


ASKED = [(name, "plain") for name in CALLS]
ASKED += [("both", "no bias"), ("both masks", "more keys"), ("a hint", "more keys")]


@pytest.mark.parametrize(("name", "options"), ASKED)
def test_attention_is_followed_and_bounded(name: str, options: str) -> None:
    model = Flat(Attending(CALLS[name], **OPTIONS[options])).eval()
    before = [dict(vars(module)) for module in model.modules()]
    plan = traced(model, (4, 4))
    assert before == [dict(vars(module)) for module in model.modules()]
    check_enclosure(plan, model, (4, 4), 1e-10)
    x = 2 * torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(1)) - 1
    bound = plan.upper(model.state_dict(), domain=lipfast.Box(-1, 1)).value
    assert float(lipfast.jacobian_norms(model, x).max()) <= bound < 1e6


def test_only_the_product_of_activations_has_no_bound_without_a_domain() -> None:
    plan = traced(Attending(CALLS["weights that nobody reads"]).eval(), (4, 4))
    model = Attending(CALLS["weights that nobody reads"])
    assert math.isinf(plan.upper(model.state_dict()).value)


def encoder(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **options)


class Masked(nn.Module):
    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        name = "src_mask" if isinstance(self.inner, nn.TransformerEncoderLayer) else "mask"
        arguments: dict[str, dict[str, Any]] = {
            "none": {},
            "causal": {name: causal, "is_causal": True},
            "mask": {name: causal},
            "padding": {"src_key_padding_mask": padding(x)},
        }
        return self.inner(x, **arguments[self.kind])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("inner", "kind"),
    [("layer", "causal"), ("norm first", "mask"), ("stack", "mask"), ("stack", "padding")],
)
def test_encoders_with_masks(inner: str, kind: str) -> None:
    torch.manual_seed(1)
    layer = encoder(norm_first=inner == "norm first")
    stack = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    model = Masked(stack if inner == "stack" else layer, kind).eval()
    plan = traced(copy.deepcopy(model), (4, 4))
    check_enclosure(plan, model, (4, 4), 1e-8)
    x = 2 * torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(1)) - 1
    bound = plan.upper(model.state_dict(), domain=lipfast.Box(-1, 1)).value
    assert float(lipfast.jacobian_norms(model, x).max()) <= bound < math.inf


def test_a_decoder_is_followed() -> None:
    torch.manual_seed(1)
    layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

    class Decoding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerDecoder(layer, 1)

        def forward(self, x: Tensor) -> Tensor:
            causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            return self.inner(x, x, tgt_mask=causal)  # type: ignore[no-any-return]

    model = Decoding().eval()
    check_enclosure(traced(model, (4, 4)), model, (4, 4), 1e-8)


class Buffered(nn.Module):
    """Attention with a mask of -inf in the state dict."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return nn.functional.scaled_dot_product_attention(h, h, h, attn_mask=self.mask)


def test_a_mask_of_the_state_dict_may_hide_entries() -> None:
    model = Buffered(hidden(4))
    plan = traced(model, (4, 4))
    check_enclosure(plan, model, (4, 4), 1e-11)
    x = 2 * torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(1)) - 1
    bound = plan.upper(model.state_dict(), domain=lipfast.Box(-1, 1)).value
    assert float(lipfast.jacobian_norms(model, x).max()) <= bound < math.inf
    assert plan.lower(model.state_dict(), x).certified
    with pytest.raises(NonFiniteError, match="a mask of -inf leaves it no entry"):
        plan.check({**model.state_dict(), "mask": torch.full((4, 4), -math.inf)})
    with pytest.raises(NonFiniteError, match=r"layer\.weight"):
        plan.check({**model.state_dict(), "layer.weight": torch.full((4, 4), -math.inf)})


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: s.masked_fill(later(4), -math.inf),
        lambda s: s.masked_fill(later(4), -1e9),
        lambda s: torch.where(later(4), torch.finfo(s.dtype).min, s),
        lambda s: s + hidden(4),
    ],
)
def test_masks_of_attention_that_is_written_out(scores: Callable[[Tensor], Tensor]) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return scores(h @ h.mT / 2.0).softmax(-1) @ h

    model = Written()
    plan = traced(model, (4, 4))
    assert [node.op for node in plan.graph.nodes].count("lipfast.weighted_rows") == 1
    check_enclosure(plan, model, (4, 4), 1e-11)
    x = 2 * torch.rand(10, 4, 4, generator=torch.Generator().manual_seed(1)) - 1
    bound = plan.upper(model.state_dict(), domain=lipfast.Box(-1, 1)).value
    assert float(lipfast.jacobian_norms(model, x).max()) <= bound < math.inf


def test_a_mask_that_hides_all_is_refused() -> None:
    class Blind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).masked_fill(torch.ones(4, 4).bool(), -math.inf).softmax(-1) @ x

    with pytest.raises(NonFiniteError, match="leaves it no entry"):
        Plan.trace(Blind(), torch.zeros(2, 4, 4)).upper({})
