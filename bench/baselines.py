"""What lipfast computes, in plain PyTorch: as a first attempt writes it, as a careful user does.

Neither proves anything: the naive upper "bound" is a product of power iterations, each of which is
low; the tuned one is a product of singular values in the weights' own precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

POWER_ITERATIONS = 100


def naive_spectral_norm(weight: Tensor) -> Tensor:
    """Spectral norm by 100 power iterations."""
    v = torch.randn(weight.shape[1], dtype=weight.dtype)
    v = v / v.norm()
    for _ in range(POWER_ITERATIONS):
        u = weight @ v
        u = u / u.norm()
        v = weight.T @ u
        v = v / v.norm()
    value: Tensor = (weight @ v).norm()
    return value


def tuned_spectral_norm(weight: Tensor) -> Tensor:
    """Spectral norm by LAPACK's SVD."""
    value: Tensor = torch.linalg.matrix_norm(weight, ord=2)
    return value


def fft_conv_norm(weight: Tensor, size: int) -> Tensor:
    """Largest singular value of the symbol at half of the frequencies of a size x size input."""
    symbol = torch.fft.rfft2(weight, s=(size, size)).permute(2, 3, 0, 1).flatten(0, 1)
    value: Tensor = torch.linalg.svdvals(symbol).max()
    return value


def naive_conv_norm(weight: Tensor, size: int) -> Tensor:
    """100 power iterations with the convolution and its adjoint; 3 x 3, zero padding of 1."""
    v = torch.randn(1, weight.shape[1], size, size, dtype=weight.dtype)
    v = v / v.norm()
    for _ in range(POWER_ITERATIONS):
        u = torch.nn.functional.conv2d(v, weight, padding=1)
        u = u / u.norm()
        v = torch.nn.functional.conv_transpose2d(u, weight, padding=1)
        v = v / v.norm()
    value: Tensor = torch.nn.functional.conv2d(v, weight, padding=1).norm()
    return value


def naive_jacobian_norms(model: nn.Module, x: Tensor) -> Tensor:
    """One Jacobian and one SVD per sample."""
    norms = []
    for sample in x:
        batch = sample.unsqueeze(0)
        jacobian = torch.autograd.functional.jacobian(model, batch)  # type: ignore[no-untyped-call]
        norms.append(torch.linalg.svdvals(jacobian.reshape(-1, sample.numel()))[0])
    return torch.stack(norms)


def gram_norms(jacobian: Tensor) -> Tensor:
    """Largest singular values of (B, K, D) through the K x K Gram matrix."""
    gram = (
        jacobian @ jacobian.mT if jacobian.shape[1] <= jacobian.shape[2] else jacobian.mT @ jacobian
    )
    values: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp_min(0).sqrt()
    return values


def vmap_jacobian_norms(model: nn.Module, x: Tensor, chunk: int = 256) -> Tensor:
    """`vmap(jacrev)` in chunks of samples, then the Gram matrix."""
    parameters = {name: value.detach() for name, value in model.state_dict().items()}

    def function(sample: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, (sample.unsqueeze(0),))
        return output.squeeze(0)

    jacobians = vmap(jacrev(function))
    return torch.cat([gram_norms(jacobians(part).flatten(2)) for part in torch.split(x, chunk)])


def loop_jacobian_norms(model: nn.Module, x: Tensor, chunk: int = 256) -> Tensor:
    """One `autograd.grad` per output for a whole chunk of samples, then the Gram matrix."""
    norms = []
    for part in torch.split(x, chunk):
        inputs = part.detach().requires_grad_(True)
        outputs = model(inputs)
        rows = [
            torch.autograd.grad(outputs[:, k].sum(), inputs, retain_graph=True)[0].flatten(1)
            for k in range(outputs.shape[1])
        ]
        norms.append(gram_norms(torch.stack(rows, dim=1)))
    return torch.cat(norms)


TUNED_JACOBIAN_NORMS = {
    "vmap(jacrev)": vmap_jacobian_norms,
    "K x autograd.grad": loop_jacobian_norms,
}


def without_parameter_gradients(model: nn.Module) -> nn.Module:
    """The model in eval mode; only inputs need gradients here."""
    return model.eval().requires_grad_(False)


def _weights(state_dict: Mapping[str, Tensor]) -> Iterable[Tensor]:
    return (value for value in state_dict.values() if value.dim() == 2)


def naive_score(model: nn.Module, path: Path, x: Tensor) -> tuple[float, float]:
    """(upper, lower) of one checkpoint."""
    state_dict = load_file(path)
    model.load_state_dict(state_dict)
    upper = math.prod(float(naive_spectral_norm(weight)) for weight in _weights(state_dict))
    return upper, float(naive_jacobian_norms(model, x).max())


def tuned_score(model: nn.Module, path: Path, x: Tensor, jacobians: str) -> tuple[float, float]:
    """(upper, lower) of one checkpoint; `jacobians` names the faster of the two tuned ways."""
    state_dict = load_file(path)
    model.load_state_dict(state_dict)
    upper = math.prod(float(tuned_spectral_norm(weight)) for weight in _weights(state_dict))
    return upper, float(TUNED_JACOBIAN_NORMS[jacobians](model, x).max())
