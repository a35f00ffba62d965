"""The bias-variance decomposition over seeds, and the Lipschitz bound on the variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError


@dataclass(frozen=True)
class Decomposition:
    """The squared test loss, split; ``loss = bias + variance``.

    Attributes:
        bias: ``E_x ||y(x) - E_s f_s(x)||^2``.
        variance: ``E_x E_s ||f_s(x) - E_s f_s(x)||^2``.
        loss: ``E_s E_x ||y(x) - f_s(x)||^2``.
    """

    bias: float
    variance: float
    loss: float


def decompose(outputs: Tensor, targets: Tensor) -> Decomposition:
    """Split the squared loss into bias and variance over the seeds (appendix 4.2).

    E_s is the mean over the S seeds at hand, so the sum is exact. As an estimate for all seeds the
    variance is low by the factor (S - 1)/S.

    Args:
        outputs: (S, B, K), of every seed at every test sample.
        targets: (B, K), for example one-hot rows times the target scale.

    Raises:
        ArgumentError: shapes do not fit.

    Example:
        >>> outputs = torch.tensor([[[0.0]], [[2.0]]])
        >>> decompose(outputs, torch.tensor([[3.0]]))
        Decomposition(bias=4.0, variance=1.0, loss=5.0)
    """
    if outputs.dim() != 3 or outputs.shape[1:] != targets.shape:
        raise ArgumentError(
            "outputs must be (seeds, samples, classes) and targets (samples, classes), got "
            f"{tuple(outputs.shape)} and {tuple(targets.shape)}"
        )
    f, y = outputs.double(), targets.double()
    mean = f.mean(dim=0)
    return Decomposition(
        bias=float((y - mean).square().sum(dim=1).mean()),
        variance=float(_variance(f)),
        loss=float((y - f).square().sum(dim=2).mean()),
    )


def _variance(outputs: Tensor) -> Tensor:
    """``E_x E_s ||f_s - E_s f_s||^2`` of (S, B, K)."""
    return (outputs - outputs.mean(dim=0)).square().sum(dim=2).mean()


class SeedAverage(nn.Module):
    """The ensemble ``x -> E_s f_s(x)``; its Jacobian is the mean of the Jacobians.

    Args:
        models: one per seed, of one input and output shape.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ArgumentError("an average needs at least one model")
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        """Average the outputs, (B, ...) -> (B, K)."""
        total: Tensor = self.models[0](x)
        for model in list(self.models)[1:]:
            total = total + model(x)
        return total / len(self.models)


def seed_averaged_norms(models: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``||E_s J_s(x_i)||_2`` per sample; its maximum is the study's estimate of C-bar.

    Appendix 2.6.11. A lower estimate of the ensemble's Lipschitz constant.

    Args:
        models: one per seed, in eval mode.
        x: (B, D...).

    Returns:
        (B,).
    """
    return lipfast.jacobian_norms(SeedAverage(models).eval(), x)


def variance_bound(
    ensemble: float, seeds: Sequence[float], x: Tensor, at_reference: float, *, around: str = "zero"
) -> float:
    """``3 (C-bar^2 + E_s C_s^2) E_x ||x - x'||^2 + 3 Var_s f_s(x')`` (appendix 4.2, bounds 0, 1).

    At least ``E_x Var_s f_s(x)`` if C-bar and C_s are Lipschitz constants of the ensemble and of
    the networks, or upper bounds on them. With lower bounds in their place, as in the study, it
    shows the trend and is no bound.

    Args:
        ensemble: C-bar.
        seeds: C_s, one per seed.
        x: test samples (B, D...).
        at_reference: ``Var_s f_s(x')``, summed over outputs.
        around: x', ``zero`` or the ``mean`` of the samples (appendix 3.13), which makes
            ``E_x ||x - x'||^2`` smallest.

    Raises:
        ArgumentError: no seed, or another `around`.

    Example:
        >>> variance_bound(1.0, [2.0, 2.0], torch.tensor([[3.0, 4.0]]), 0.5)
        376.5
    """
    if not seeds:
        raise ArgumentError("the bound needs the constant of at least one seed")
    if around not in {"zero", "mean"}:
        raise ArgumentError(f"around must be 'zero' or 'mean', got {around!r}")
    flat = x.flatten(1).double()
    if around == "mean":
        flat = flat - flat.mean(dim=0)
    radius = float(flat.square().sum(dim=1).mean())
    mean_square = sum(value**2 for value in seeds) / len(seeds)
    return 3 * (ensemble**2 + mean_square) * radius + 3 * at_reference


def variance_at(models: Sequence[nn.Module], point: Tensor) -> float:
    """``Var_s f_s(x') = E_s ||f_s(x') - E_s f_s(x')||^2`` at one point.

    Args:
        models: one per seed, in eval mode.
        point: (D...).
    """
    with torch.no_grad():
        outputs = torch.stack([model(point.unsqueeze(0)).double() for model in models])
    return float(_variance(outputs))
