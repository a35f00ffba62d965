"""Bounds at perturbed samples: adversarial, and out of the data's distribution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lipfast
from lipfast.errors import ArgumentError


@dataclass(frozen=True)
class PerturbedEstimates:
    """What perturbing the samples does to the lower bound (appendices 3.2 and 3.3).

    Attributes:
        clean: ``max_i ||J(x_i)||_2``.
        perturbed: ``max_i ||J(x_i + e_i)||_2``.
        quotient: ``max_i ||f(x_i + e_i) - f(x_i)||_2 / ||e_i||_2``, the study's
            C_adv.straightforward; NaN where no sample moved.
        mean: ``mean_i ||J(x_i + e_i)||_2``.
        radius: ``max_i ||e_i||_2``.
    """

    clean: float
    perturbed: float
    quotient: float
    mean: float
    radius: float

    @property
    def ratio(self) -> float:
        """The lower bound on perturbed samples over that on clean ones."""
        return self.perturbed / self.clean


def perturbed_estimates(model: nn.Module, x: Tensor, perturbed: Tensor) -> PerturbedEstimates:
    """Compare the lower bound on samples with that on their perturbed copies.

    All of these are lower estimates of the same Lipschitz constant, none certified.

    Args:
        model: in eval mode, (B, D...) -> (B, K).
        x: (B, D...).
        perturbed: (B, D...), for example by projected gradient descent on the loss, or with noise.

    Raises:
        ArgumentError: the shapes differ.
    """
    if x.shape != perturbed.shape:
        raise ArgumentError(
            f"samples {tuple(x.shape)} and perturbed samples {tuple(perturbed.shape)} differ"
        )
    clean = lipfast.jacobian_norms(model, x)
    moved = lipfast.jacobian_norms(model, perturbed)
    # Differences in float64: close points agree in most digits of their outputs.
    distance = (perturbed.double() - x.double()).flatten(1).norm(dim=1)
    with torch.no_grad():
        change = (model(perturbed).double() - model(x).double()).flatten(1).norm(dim=1)
    apart = distance > 0
    quotient = float((change[apart] / distance[apart]).max()) if bool(apart.any()) else float("nan")
    return PerturbedEstimates(
        clean=float(clean.max()),
        perturbed=float(moved.max()),
        quotient=quotient,
        mean=float(moved.mean()),
        radius=float(distance.max()),
    )
