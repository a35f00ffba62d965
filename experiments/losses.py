"""The losses of the studies, of many networks at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LOSSES = ("cross_entropy", "mse", "nll")
# Smallest probability that "nll" takes the logarithm of: 1/float32's largest finite inverse.
_TINY = 1e-38


def network_losses(loss: str, outputs: Tensor, labels: Tensor, target_scale: float = 1.0) -> Tensor:
    """Average the loss over the samples, per network.

    "cross_entropy": of the softmax of the outputs; "mse": `sum_k (f_k - c onehot_k)^2`; "nll":
    `-log f_y`, for networks that end in a softmax.

    Args:
        loss: one of `LOSSES`.
        outputs: (N, classes, batch).
        labels: int64 (N, batch), or (batch,) for all networks alike.
        target_scale: c of "mse".

    Returns:
        (N,).
    """
    labels = labels.expand(outputs.shape[0], outputs.shape[2])
    if loss == "cross_entropy":
        return functional.cross_entropy(outputs, labels, reduction="none").mean(dim=1)
    at_label = outputs.gather(1, labels.unsqueeze(1)).squeeze(1)
    if loss == "nll":
        return -at_label.clamp_min(_TINY).log().mean(dim=1)
    # (f_k - c)^2 = f_k^2 + c^2 - 2 c f_k at the label: no one-hot tensor is built.
    square = target_scale * target_scale
    per_sample = outputs.square().sum(dim=1) + square - 2 * target_scale * at_label
    return per_sample.mean(dim=1)


def _subtract_at_labels(gradient: Tensor, labels: Tensor, value: float) -> None:
    labels = labels.expand(gradient.shape[0], gradient.shape[2]).unsqueeze(1)
    gradient.scatter_add_(1, labels, gradient.new_full((), -value).expand(labels.shape))


def _cross_entropy_gradient(
    outputs: Tensor, labels: Tensor, target_scale: float, gradient: Tensor
) -> None:
    """`(softmax(f) - onehot) / batch`."""
    share = 1 / outputs.shape[2]
    torch.softmax(outputs, 1, out=gradient)
    gradient.mul_(share)
    _subtract_at_labels(gradient, labels, share)


def _mse_gradient(outputs: Tensor, labels: Tensor, target_scale: float, gradient: Tensor) -> None:
    """`2 (f - c onehot) / batch`."""
    share = 2 / outputs.shape[2]
    torch.mul(outputs, share, out=gradient)
    _subtract_at_labels(gradient, labels, share * target_scale)


# Loss to the gradient of `network_losses` by the outputs (N, classes, batch), which is written into
# the last argument; the others are outputs, labels and the target scale.
LOSS_GRADIENTS: dict[str, Callable[[Tensor, Tensor, float, Tensor], None]] = {
    "cross_entropy": _cross_entropy_gradient,
    "mse": _mse_gradient,
}
