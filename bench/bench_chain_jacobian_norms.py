"""The fused op by activation: what a forward pass with derivatives costs beside the products."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from bench.turns import Benchmark, Implementations, in_turn, measure
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms
from lipfast.ops.chain_stages import Activation, Linear, Stage

SAMPLES, WIDTHS = 1000, (40, 256, 256, 10)
RELU = "lipfast"
SMOOTH = ("tanh", "sigmoid", "gelu", "silu", "elu")


@cache
def chain_problem() -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.randn(after, before, generator=generator) / before**0.5
        for before, after in pairwise(WIDTHS)
    ]
    return torch.randn(SAMPLES, WIDTHS[0], generator=generator), weights, [None] * len(weights)


def activation_implementations() -> Implementations:
    x, weights, biases = chain_problem()

    def run(activation: Activation) -> Tensor:
        stages: list[Stage] = [Linear(), activation, Linear(), activation, Linear()]
        return chain_jacobian_norms(x, [weights], [biases], stages)[0]

    parameters = {"elu": (1.0,)}
    smooth = {name: Activation(name, parameters.get(name, ())) for name in SMOOTH}
    return {
        RELU: (lambda: run(Activation("relu")), SAMPLES),
        **{name: (lambda a=a: run(a), SAMPLES) for name, a in smooth.items()},  # type: ignore[misc]
    }


@in_turn(RELU, *SMOOTH)
def bench_activations(benchmark: Benchmark, turn: int, implementation: str) -> None:
    case = "fused Jacobian norms, 40-256-256-10, per sample: ReLU, then others"
    measure(benchmark, case, implementation, activation_implementations()[implementation])
