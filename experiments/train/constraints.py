"""Training that limits the Lipschitz constant: scaled layers, a penalty on the Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

import lipfast
from experiments.config import SweepConfig
from experiments.train.networks import Group


def constrain_spectral_norms(group: Group, limit: float) -> None:
    """Scale each weight matrix, in place, to a spectral norm of at most `limit`.

    A matrix that is scaled has a certified norm of `limit`, up to the rounding of float32. Matrices
    with NaN or infinite entries, of networks that diverge, are left as they are.

    Args:
        group: fully connected networks; weights (N, out, in).
        limit: largest spectral norm of a layer.
    """
    with torch.no_grad():
        weights = [t for name, t in group.parameters.items() if name.endswith("weight")]
        layers = [matrix for weight in weights for matrix in weight.detach()]
        layers = [layer for layer in layers if layer.isfinite().all()]
        if not layers:
            return
        norms = lipfast.spectral_norms(layers).upper
        for layer, norm in zip(layers, norms.tolist(), strict=True):
            if norm > limit:
                layer.mul_(limit / norm)


def jacobian_penalty(config: SweepConfig, group: Group, x: Tensor) -> Tensor:
    """Sum over networks of the largest Jacobian norm over the first samples of their batch.

    Differentiable with respect to the parameters, by `lipfast.jacobian_norms`.

    Args:
        config: says how many samples.
        group: the networks.
        x: the batch, as `Group.forward` takes it.
    """
    total = x.new_zeros(())
    for index in range(len(group.networks)):
        own = x[index] if config.model == "fcn" and x.dim() == 3 else x
        own = own.t() if config.model == "fcn" else own
        samples = own[: config.penalty_samples].contiguous()
        norms = lipfast.jacobian_norms(group.model(index), samples, create_graph=True)
        total = total + norms.max()
    return total
