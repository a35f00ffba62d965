"""`nn.MultiheadAttention` with the samples in front, so that it can be followed sample by sample.

torch's own forward function turns the input around and joins samples and heads to one dimension.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipfast.ops.restoring import Restoring

# Whether a mask is causal, they find out from its entries, which a trace does not have. It is a
# hint that changes no value: the argument that says that it is not.
_HINTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoder: ("is_causal",),
    nn.TransformerDecoder: ("tgt_is_causal", "memory_is_causal"),
}


@contextlib.contextmanager
def samples_in_front(model: nn.Module) -> Iterator[None]:
    """Attention modules of `model` that have the samples in front compute the same that way.

    Calls without samples, and with masks that differ between heads, run torch's own code. The
    modules are as before afterwards.
    """
    changed: list[nn.Module] = []

    def put_back() -> None:
        for module in changed:
            vars(module).pop("forward", None)

    undo = Restoring(put_back)
    with undo, undo, undo:
        for module in model.modules():
            if "forward" in vars(module):
                continue
            if type(module) is nn.MultiheadAttention and module.batch_first:
                forward = _forward(module)
            elif type(module) in _HINTS:
                forward = _without_hint(module)
            else:
                continue
            changed.append(module)
            vars(module)["forward"] = forward
        yield


def _without_hint(module: nn.Module) -> Callable[..., Any]:
    original, names = module.forward, _HINTS[type(module)]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name in names:
            if bound.arguments.get(name) is None:
                bound.arguments[name] = False
        return original(*bound.args, **bound.kwargs)

    return forward


def _forward(module: nn.MultiheadAttention) -> Callable[..., Any]:
    original = module.forward
    signature = inspect.signature(original)

    @functools.wraps(original)  # export names the inputs after torch's own arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        mask = given["attn_mask"]
        if given["query"].dim() != 3 or (mask is not None and mask.dim() != 2):
            return original(*args, **kwargs)
        return _attended(module, given)

    return forward


def _attended(
    module: nn.MultiheadAttention, given: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """What the module computes of the arguments of its `forward`."""
    query, key, value = (given[name] for name in ("query", "key", "value"))
    queries, keys, values = _projected(module, query, key, value)
    padding, table = given["key_padding_mask"], given["attn_mask"]
    if module.bias_k is not None and module.bias_v is not None:
        keys, values = (
            torch.cat([tensor, bias.expand(tensor.shape[0], -1, -1)], 1)
            for tensor, bias in ((keys, module.bias_k), (values, module.bias_v))
        )
    heads = [
        torch.unflatten(tensor, -1, (module.num_heads, module.head_dim)).transpose(1, 2)
        for tensor in (queries, keys, values)
    ]
    if module.add_zero_attn:  # one more key and value, of zeros
        heads[1:] = [functional.pad(tensor, (0, 0, 0, 1)) for tensor in heads[1:]]
    # torch takes the word for the mask only where nothing else needs it.
    causal = given["is_causal"] and padding is None and not given["need_weights"]
    mask = None if causal else _mask(table, padding, heads[0], heads[1].shape[2])
    query, key, value = heads
    mixed = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=bool(causal)
    )
    result = module.out_proj(mixed.transpose(1, 2).flatten(2))
    if not given["need_weights"]:
        return result, None
    scores = (query @ key.transpose(-1, -2)) / math.sqrt(module.head_dim)
    weights = (scores if mask is None else scores + mask).softmax(-1)
    return result, weights.mean(1) if given["average_attn_weights"] else weights


def _mask(table: Tensor | None, padding: Tensor | None, query: Tensor, keys: int) -> Tensor | None:
    """Both masks as one that is added to the scores: of all samples, and of all queries."""
    found = None
    for mask, places in ((table, (None, None)), (padding, (slice(None), None, None))):
        if mask is None:
            continue
        additive = _additive(mask, query)
        if keys > mask.shape[-1]:  # what the module adds (`add_bias_kv`, `add_zero_attn`), all see
            additive = functional.pad(additive, (0, keys - mask.shape[-1]))
        found = additive[places] if found is None else found + additive[places]
    return found


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """-inf where a mask of truth values hides; masks of numbers as they are."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    zeros = torch.zeros_like(mask, dtype=like.dtype)
    return zeros.masked_fill(mask, -math.inf)


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> list[Tensor]:
    """Queries, keys and values of all heads, from the joint weight or from three."""
    if module._qkv_same_embed_dim:
        if query is key and key is value:
            joint = functional.linear(query, module.in_proj_weight, module.in_proj_bias)
            return list(joint.chunk(3, -1))
        weights: list[Tensor] = list(module.in_proj_weight.chunk(3))
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases: list[Tensor | None] = [None] * 3
    if module.in_proj_bias is not None:
        biases = list(module.in_proj_bias.chunk(3))
    return [
        functional.linear(tensor, weight, bias)
        for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
