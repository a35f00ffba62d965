"""The losses of the studies, of many networks at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from experiments.config import SweepConfig

LOSSES = ("cross_entropy", "mse", "nll")
# Smallest probability that "nll" takes the logarithm of: 1/float32's largest finite inverse.
_TINY = 1e-38


def network_losses(config: SweepConfig, outputs: Tensor, labels: Tensor) -> Tensor:
    """Average the loss over the samples, per network.

    "cross_entropy": of the softmax of the outputs; "mse": `sum_k (f_k - c onehot_k)^2`; "nll":
    `-log f_y`, for networks that end in a softmax.

    Args:
        config: names the loss and the target scale c.
        outputs: (N, classes, batch).
        labels: int64 (N, batch), or (batch,) for all networks alike.

    Returns:
        (N,).
    """
    labels = labels.expand(outputs.shape[0], outputs.shape[2])
    if config.loss == "cross_entropy":
        return functional.cross_entropy(outputs, labels, reduction="none").mean(dim=1)
    at_label = outputs.gather(1, labels.unsqueeze(1)).squeeze(1)
    if config.loss == "nll":
        return -at_label.clamp_min(_TINY).log().mean(dim=1)
    # (f_k - c)^2 = f_k^2 + c^2 - 2 c f_k at the label: no one-hot tensor is built.
    scale = config.target_scale
    per_sample = outputs.square().sum(dim=1) + scale * scale - 2 * scale * at_label
    return per_sample.mean(dim=1)
