"""Per-sample Jacobian norms against plain PyTorch: MLPs, many checkpoints, a CNN."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench import baselines, chains
from bench.turns import Benchmark, Implementations, in_turn, measure
from experiments.models import cnn
from lipfast.ops.chain_jacobian_norms import chain_jacobian_norms

CHECKPOINTS, FEW_CHECKPOINTS, FEW = 100, 5, 20
MM = 1024  # rows and columns of the product that measures torch.mm's rate

LIPFAST, VMAP, LOOP = "lipfast", "tuned (vmap(jacrev))", "tuned (K x autograd.grad)"
NAIVE, RATE = "naive (jacobian, SVD per sample)", "as many operations in torch.mm"


def fused(model: nn.Sequential, x: Tensor) -> Tensor:
    """Norms of one model by the fused op."""
    weights, biases, stages = chains.chain_of(model)
    return chain_jacobian_norms(x, [weights], [biases], stages)[0]


def products(operations: float) -> tuple[Callable[[], object], int]:
    """A square product, and how many units of `operations` floating-point operations it is."""
    left, right = torch.ones(MM, MM), torch.ones(MM, MM)
    return (lambda: torch.mm(left, right)), max(1, round(2 * MM**3 / operations))


def model_implementations(model: nn.Sequential, x: Tensor) -> Implementations:
    samples = x.shape[0]
    return {
        LIPFAST: (lambda: fused(model, x), samples),
        VMAP: (lambda: baselines.vmap_jacobian_norms(model, x), samples),
        LOOP: (lambda: baselines.loop_jacobian_norms(model, x), samples),
        NAIVE: (lambda: baselines.naive_jacobian_norms(model, x[:FEW]), min(FEW, samples)),
        RATE: products(chains.dense_operations(model, x)),
    }


def mlp(widths: tuple[int, ...]) -> nn.Sequential:
    layers = [m for pair in pairwise(widths) for m in (nn.Linear(*pair), nn.ReLU())][:-1]
    model = nn.Sequential(*layers)
    baselines.without_parameter_gradients(model)
    return model


@cache
def mlp_problem(widths: tuple[int, ...], samples: int) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    return mlp(widths), torch.randn(samples, widths[0])


@cache
def cnn_problem() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = cnn(20)  # widths 20 to 160, pools 1, 2, 2, 8, no biases
    baselines.without_parameter_gradients(model)
    return model, torch.rand(128, 3, 32, 32)


@in_turn(LIPFAST, VMAP, LOOP, NAIVE, RATE)
def bench_mlp_40(benchmark: Benchmark, turn: int, implementation: str) -> None:
    model, x = mlp_problem((40, 256, 256, 10), 1000)
    case = "Jacobian norms, 40-256-256-10, B = 1000, per sample"
    work = model_implementations(model, x)[implementation]
    measure(benchmark, case, implementation, work, operations=chains.dense_operations(model, x))


@in_turn(LIPFAST, VMAP, LOOP, NAIVE, RATE)
def bench_mlp_784(benchmark: Benchmark, turn: int, implementation: str) -> None:
    model, x = mlp_problem((784, 256, 256, 10), 256)
    case = "Jacobian norms, 784-256-256-10, B = 256, per sample"
    work = model_implementations(model, x)[implementation]
    measure(benchmark, case, implementation, work, operations=chains.dense_operations(model, x))


@in_turn(LIPFAST, VMAP, LOOP, NAIVE, RATE, turns=3, once=(VMAP,))
def bench_cnn(benchmark: Benchmark, turn: int, implementation: str) -> None:
    model, x = cnn_problem()
    case = "Jacobian norms, CNN of width 20, 3 x 32 x 32, B = 128, per sample"
    work = model_implementations(model, x)[implementation]
    operations = chains.dense_operations(model, x)
    once = implementation == VMAP
    measure(benchmark, case, implementation, work, operations=operations, warmup=not once)


@cache
def checkpoints_problem() -> tuple[list[nn.Sequential], Tensor]:
    torch.manual_seed(0)
    models = [mlp((40, 256, 256, 10)) for _ in range(CHECKPOINTS)]
    return models, torch.randn(1000, 40)


def checkpoint_implementations() -> Implementations:
    models, x = checkpoints_problem()
    few = models[:FEW_CHECKPOINTS]
    read = [chains.chain_of(model) for model in models]
    weights, biases = [entry[0] for entry in read], [entry[1] for entry in read]
    return {
        LIPFAST: (lambda: chain_jacobian_norms(x, weights, biases, read[0][2]), CHECKPOINTS),
        VMAP: (lambda: [baselines.vmap_jacobian_norms(m, x) for m in few], FEW_CHECKPOINTS),
        LOOP: (lambda: [baselines.loop_jacobian_norms(m, x) for m in few], FEW_CHECKPOINTS),
    }


@in_turn(LIPFAST, VMAP, LOOP)
def bench_checkpoints(benchmark: Benchmark, turn: int, implementation: str) -> None:
    models, x = checkpoints_problem()
    case = "Jacobian norms, 100 checkpoints of 40-256-256-10 in one call, B = 1000, per checkpoint"
    operations = chains.dense_operations(models[0], x) * len(x)
    work = checkpoint_implementations()[implementation]
    measure(benchmark, case, implementation, work, operations=operations)
