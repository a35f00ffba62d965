"""Digests that say which weights a certificate was made for."""

from __future__ import annotations

import hashlib

import torch

from lipfast.plan.architecture import Architecture
from lipfast.plan.checked import StateDict, resolve


def weights_digest(plan: Architecture, state_dict: StateDict) -> str:
    """Digest of the numbers of a state dict, by the plan's own names."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(resolve(plan, state_dict).items()):
        if name not in plan.parameters:
            continue
        own = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tuple(own.shape)} {own.dtype} ".encode())
        found.update(own.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
