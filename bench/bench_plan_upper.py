"""Upper bounds of a residual network: what a call costs beside the norms of its layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lipfast
from bench import baselines
from bench.turns import Benchmark, Implementations, in_turn, measure

BLOCKS, WIDTH, UNITS, CALLS = 16, 40, 64, 50


class Block(nn.Module):
    """``x + V relu(U x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(WIDTH, UNITS), nn.Linear(UNITS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        result: Tensor = x + self.v(torch.relu(self.u(x)))
        return result


def product_of_svds(model: nn.Sequential) -> float:
    """Norms by LAPACK in the weights' own precision, multiplied block by block."""
    total = 1.0
    for module in model:
        if isinstance(module, Block):
            norms = [baselines.tuned_spectral_norm(m.weight.detach()) for m in (module.u, module.v)]
            total *= 1.0 + float(norms[0] * norms[1])
        else:
            assert isinstance(module, nn.Linear)
            total *= float(baselines.tuned_spectral_norm(module.weight.detach()))
    return total


@in_turn("lipfast", "tuned (SVDs, not certified)")
def bench_residual(benchmark: Benchmark, turn: int, implementation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(BLOCKS)), nn.Linear(WIDTH, 10))
    plan = lipfast.compile(model, torch.zeros(2, WIDTH))
    state_dict = model.state_dict()
    work: Implementations = {
        "lipfast": (lambda: [plan.upper(state_dict) for _ in range(CALLS)], CALLS),
        "tuned (SVDs, not certified)": (
            lambda: [product_of_svds(model) for _ in range(CALLS)],
            CALLS,
        ),
    }
    case = f"plan.upper, {BLOCKS} residual blocks of {WIDTH} and {UNITS} units, one network"
    measure(benchmark, case, implementation, work[implementation])
