"""`nn.MultiheadAttention` with the samples in front, so that it can be followed sample by sample.

torch's own forward function turns the input around and joins samples and heads to one dimension.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextlib.contextmanager
def samples_in_front(model: nn.Module) -> Iterator[None]:
    """Attention modules of `model` that have the samples in front compute the same that way.

    Only calls without masks and without attention weights as a result are replaced; all others run
    torch's own code. The modules are as before afterwards.
    """
    changed = [
        module
        for module in model.modules()
        if type(module) is nn.MultiheadAttention
        and module.batch_first
        and module.bias_k is None
        and module.bias_v is None
        and not module.add_zero_attn
        and "forward" not in vars(module)
    ]
    try:
        for module in changed:
            vars(module)["forward"] = _forward(module)
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _forward(module: nn.MultiheadAttention) -> Callable[..., Any]:
    original = module.forward
    signature = inspect.signature(original)

    @functools.wraps(original)  # export names the inputs after torch's own arguments
    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        query, key, value = given["query"], given["key"], given["value"]
        masks = given["key_padding_mask"], given["attn_mask"], given["is_causal"] or None
        plain = all(mask is None for mask in masks) and not given["need_weights"]
        if not plain or query.dim() != 3:
            return original(*args, **kwargs)
        heads = [
            torch.unflatten(tensor, -1, (module.num_heads, module.head_dim)).transpose(1, 2)
            for tensor in _projected(module, query, key, value)
        ]
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        return module.out_proj(mixed.transpose(1, 2).flatten(2)), None

    return forward


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
