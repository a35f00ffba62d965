"""Samples beside the data: convex combinations, Gaussian noise, adversarial examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipfast.errors import ArgumentError


def convex_combinations(x: Tensor, weights: Sequence[float], count: int, seed: int = 0) -> Tensor:
    r"""$\lambda x_i + (1 - \lambda) x_j$ for random pairs i != j (Khromov and Singh, 2024, S*).

    Args:
        x: (samples, ...), at least two samples.
        weights: the values of lambda, between 0 and 1.
        count: pairs for each of them.
        seed: of the pairs.

    Returns:
        (len(weights) * count, ...), those of the first weight first.

    Raises:
        ArgumentError: there is one sample only, or a weight is outside [0, 1].

    Example:
        >>> convex_combinations(torch.tensor([[0.0], [1.0]]), [0.25], 3).unique().tolist()
        [0.25, 0.75]
    """
    if len(x) < 2:
        raise ArgumentError(f"convex combinations need at least 2 samples, got {len(x)}")
    if not all(0 <= weight <= 1 for weight in weights):
        raise ArgumentError(f"weights are {list(weights)}; they must be between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    for weight in weights:
        first = torch.randint(len(x), (count,), generator=generator)
        offset = torch.randint(1, len(x), (count,), generator=generator)
        parts.append(weight * x[first] + (1 - weight) * x[(first + offset) % len(x)])
    return torch.cat(parts)


def _norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped to divide it."""
    norms: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (x.dim() - 1))


def gaussian_perturbation(x: Tensor, radius: float, seed: int = 0) -> Tensor:
    """Move each sample by `radius` (Euclidean norm) in a random direction, uniform on the sphere.

    Args:
        x: (samples, ...).
        radius: at least 0.
        seed: of the directions; the same seed gives the same directions for every radius.

    Returns:
        As `x`.

    Example:
        >>> moved = gaussian_perturbation(torch.zeros(3, 8), 0.5)
        >>> bool(torch.allclose(moved.norm(dim=1), torch.tensor(0.5)))
        True
    """
    if not (radius >= 0 and math.isfinite(radius)):
        raise ArgumentError(f"radius is {radius}; it must be finite and at least 0")
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return (x + radius * noise / _norms(noise)).to(x.dtype)


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Eval mode of a module; the mode of every part is restored."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    steps: int = 20,
    step_size: float | None = None,
    norm: float = 2,
    clip: tuple[float, float] | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Adversarial examples by projected gradient ascent on the cross-entropy (Madry et al., 2018).

    $x_{k+1} = P(x_k + \alpha\, d(\nabla_x L))$ from a random start within the ball, P the
    projection onto the ball of radius epsilon about x, d the steepest direction: the gradient over
    its norm (norm 2), or its signs (norm inf).

    Args:
        model: logits of samples; a module is evaluated in eval mode and left as it was found.
        x: (samples, ...).
        y: int64 (samples,), the true labels.
        epsilon: radius of the ball.
        steps: how many.
        step_size: alpha; 2.5 epsilon / steps by default.
        norm: 2 or inf.
        clip: lowest and highest value of an input, where it has limits.
        seed: of the start.

    Returns:
        As `x`, within epsilon of it.

    Raises:
        ArgumentError: the norm is another one, or epsilon is negative.

    Example:
        >>> w = torch.tensor([[3.0, -4.0]])
        >>> attacked = pgd(lambda x: torch.cat([x @ w.t(), -x @ w.t()], 1), torch.zeros(1, 2),
        ...     torch.tensor([0]), 0.5, step_size=0.5)
        >>> [round(value, 3) for value in attacked[0].tolist()]
        [-0.3, 0.4]
    """
    if norm not in {2, math.inf}:
        raise ArgumentError(f"norm is {norm}; pgd has 2 and inf")
    if not (epsilon >= 0 and math.isfinite(epsilon)):
        raise ArgumentError(f"epsilon is {epsilon}; it must be finite and at least 0")
    alpha = 2.5 * epsilon / max(steps, 1) if step_size is None else step_size

    def projected(moved: Tensor) -> Tensor:
        shift = moved - x
        if norm == 2:
            shift = shift * (epsilon / _norms(shift).clamp_min(1e-30)).clamp(max=1)
        else:
            shift = shift.clamp(-epsilon, epsilon)
        return x + shift if clip is None else (x + shift).clamp(*clip)

    with _evaluating(model):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(x.shape, generator=generator).to(x.dtype)
        attacked = projected(x + epsilon * start / _norms(start).clamp_min(1e-30))
        for _ in range(steps):
            with torch.enable_grad():
                variable = attacked.detach().requires_grad_()
                loss = functional.cross_entropy(model(variable), y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, variable)
            if norm == 2:
                direction = gradient / _norms(gradient).clamp_min(1e-30)
            else:
                direction = gradient.sign()
            attacked = projected(attacked + alpha * direction)
    return attacked.detach()
